//! One connection to a guest's port, without any I/O: what comes in, what it means, and when it is too much.

use super::bucket::Bucket;
use super::line::{FromGuest, Helper, Lines, TooLong};
use std::time::Instant;

/// What a guest has said, as far as it counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// A helper is there and knows us.
    Helper(Helper),
    /// A helper is there and asks for a greeting.
    Stranger,
    /// It asks to be moved.
    Request { number: u64, host: String },
    /// So many processes are slowed, by so much; none when it has ended.
    Stunned(Option<(u32, u32)>),
}

/// More than a guest may say: it is cut off for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flood {
    LongLine,
    ManyLines,
}

impl From<TooLong> for Flood {
    fn from(TooLong: TooLong) -> Self {
        Self::LongLine
    }
}

/// The state of a connection.
#[derive(Debug)]
pub(super) struct Session {
    nonce: String,
    lines: Lines,
    bucket: Bucket,
    /// The greatest number of a request. What is not above it was said before.
    number: u64,
}

impl Session {
    /// `nonce` is one that nobody has seen: what was said to another agent, or before a move, does not have it.
    pub(super) fn new(nonce: String, now: Instant) -> Self {
        Self { nonce, lines: Lines::default(), bucket: Bucket::full(now), number: 0 }
    }

    pub(super) fn nonce(&self) -> &str {
        &self.nonce
    }

    /// Something was asked, and will be answered with a line.
    pub(super) fn asked(&mut self) {
        self.bucket.grant();
    }

    /// Takes what has come. What is not understood, or belongs to another connection, does nothing but count.
    pub(super) fn hear(&mut self, bytes: &[u8], now: Instant) -> Result<Vec<Heard>, Flood> {
        let Self { nonce, lines, bucket, number } = self;
        let mut all = Vec::new();
        lines.take(bytes, |line| {
            if !bucket.take(now) {
                return Err(Flood::ManyLines);
            }
            all.extend(FromGuest::parse(line).and_then(|said| understand(said, nonce, number)));
            Ok(())
        })?;
        Ok(all)
    }
}

fn understand(said: FromGuest, ours: &str, last: &mut u64) -> Option<Heard> {
    match said {
        FromGuest::Hello { nonce: None, .. } => Some(Heard::Stranger),
        FromGuest::Hello { nonce, helper } => {
            (nonce.as_deref() == Some(ours)).then_some(Heard::Helper(helper))
        }
        FromGuest::Migrate { nonce, number, host } => {
            let fresh = nonce == ours && number > *last;
            fresh.then(|| {
                *last = number;
                Heard::Request { number, host }
            })
        }
        FromGuest::Stunned { processes, percent } => Some(Heard::Stunned(Some((processes, percent)))),
        FromGuest::Running => Some(Heard::Stunned(None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn session(now: Instant) -> Session {
        Session::new("new".into(), now)
    }

    fn request(number: u64) -> Heard {
        Heard::Request { number, host: "b".into() }
    }

    #[test]
    fn a_request_counts_once_and_only_in_its_own_connection() {
        let now = Instant::now();
        let mut session = session(now);
        assert_eq!(session.hear(b"migrate old 9 b\n", now), Ok(vec![]), "of an earlier connection");
        assert_eq!(session.hear(b"migrate new 1 b\n", now), Ok(vec![request(1)]));
        assert_eq!(session.hear(b"migrate new 1 b\n", now), Ok(vec![]), "replayed");
        assert_eq!(session.hear(b"migrate new 0 b\n", now), Ok(vec![]));
        assert_eq!(session.hear(b"migrate new 18446744073709551615 b\n", now), Ok(vec![request(u64::MAX)]));
        assert_eq!(session.hear(b"migrate new 2 b\n", now), Ok(vec![]), "it has used up its numbers");
    }

    #[test]
    fn the_rest_of_a_line_that_a_move_has_cut_does_no_harm() {
        let now = Instant::now();
        let mut session = session(now);
        let said =
            session.hear(b"rate old 1 b\n\nhello 1 - migrate,stun x/1\nhello 1 new migrate,stun x/1\n", now);
        let helper = Helper {
            version: 1,
            capabilities: vec!["migrate".into(), "stun".into()],
            software: "x/1".into(),
        };
        assert_eq!(said, Ok(vec![Heard::Stranger, Heard::Helper(helper)]));
        assert_eq!(session.hear(b"hello 1 old migrate x/1\n", now), Ok(vec![]), "it greets somebody else");
    }

    #[test]
    fn floods_are_cut_off() {
        let now = Instant::now();
        assert_eq!(session(now).hear(&vec![b'x'; 1 << 20], now), Err(Flood::LongLine));
        assert_eq!(session(now).hear(&b"running\n".repeat(100), now), Err(Flood::ManyLines));
        let requests: String = (1..100).map(|number| format!("migrate new {number} b\n")).collect();
        assert_eq!(session(now).hear(requests.as_bytes(), now), Err(Flood::ManyLines));
        assert_eq!(session(now).hear(&vec![b'\n'; 1 << 16], now), Err(Flood::ManyLines), "empty lines count");
    }

    #[test]
    fn answers_to_our_questions_are_no_flood() {
        let now = Instant::now();
        let mut session = session(now);
        for _ in 0..1000 {
            session.asked();
            assert_eq!(session.hear(b"stunned 1 50\n", now), Ok(vec![Heard::Stunned(Some((1, 50)))]));
        }
    }

    proptest! {
        /// Whatever a guest says, in whatever pieces and at whatever times: no panic, and no more than it may.
        #[test]
        fn never_more_than_its_share(pieces in prop::collection::vec(
            ("(migrate new [0-9]{1,3} [a-c]\n|hello 1 - m s\n|[ -~]{0,9}\n?){0,30}", 0u64..3000), 0..20)) {
            let start = Instant::now();
            let (mut session, mut passed, mut heard) = (session(start), Duration::ZERO, 0);
            for (piece, ms) in pieces {
                passed += Duration::from_millis(ms);
                match session.hear(piece.as_bytes(), start + passed) {
                    Ok(all) => heard += all.len() as u64,
                    Err(_) => break,
                }
            }
            prop_assert!(heard <= 10 + passed.as_secs(), "{} in {:?}", heard, passed);
        }
    }
}
