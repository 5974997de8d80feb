//! What is said on the port: lines of printable ASCII, words with one space between (PROTOCOL.md, "The guest's port").
//!
//! The guest trusts its host, but not that a line arrives whole: a move may cut one in two. So what is not understood is
//! left out, and each greeting begins with an empty line, which ends whatever was begun before.

use std::fmt;

/// The version that is spoken.
pub const VERSION: u32 = 1;
/// The longest line with its end, either way. What is longer is thrown away up to its end.
pub const LINE_MAX: usize = 512;
/// The longest name of a host or identity, and the longest nonce.
pub const WORD_MAX: usize = 64;
/// The most of its time that may be taken from a process: what gets nothing at all looks dead to whoever waits for it.
pub const PERCENT_MAX: u32 = 95;
/// The longest that one order stuns: whoever wants more says it again, and a host that is gone does not.
pub const STUN_MS_MAX: u32 = 10_000;

/// From the host's agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromAgent {
    /// It is there. The nonce is new with each connection, and stands in every request.
    Hello {
        /// The latest version that it speaks.
        version: u32,
        /// Names this connection.
        nonce: String,
    },
    /// Take this part of their time from the processes that write most.
    Stun {
        /// Of 100.
        percent: u32,
        /// For how long, if nothing else is said.
        ms: u32,
    },
    /// Let them run.
    Unstun,
    /// A request is granted.
    Accepted {
        /// The request's number.
        number: u64,
        /// The migration's identity.
        migration: String,
        /// Where it leads to.
        host: String,
    },
    /// A request is not granted.
    Refused {
        /// The request's number.
        number: u64,
        /// Why.
        reason: String,
    },
}

impl FromAgent {
    /// Reads a line without its end; nothing if it is none of these.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "hello" => {
                let [version, nonce] = words(rest)?;
                Some(Self::Hello { version: version.parse().ok()?, nonce: name(nonce)? })
            }
            "stun" => {
                let [percent, ms] = words(rest)?;
                let (percent, ms) = (percent.parse::<u32>().ok()?, ms.parse::<u32>().ok()?);
                Some(Self::Stun { percent: percent.min(PERCENT_MAX), ms: ms.min(STUN_MS_MAX) })
            }
            "unstun" if line == word => Some(Self::Unstun),
            "accepted" => {
                let [number, migration, host] = words(rest)?;
                let (migration, host) = (name(migration)?, name(host)?);
                Some(Self::Accepted { number: number.parse().ok()?, migration, host })
            }
            "refused" => {
                let (number, reason) = rest.split_once(' ')?;
                Some(Self::Refused { number: number.parse().ok()?, reason: reason.to_owned() })
            }
            _ => None,
        }
    }
}

/// To the host's agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToAgent {
    /// Who we are.
    Hello {
        /// The agent's nonce, or nothing yet: then it is asked to greet.
        nonce: Option<String>,
        /// What we can do.
        capabilities: &'static str,
    },
    /// Move this VM.
    Migrate {
        /// Of this connection: a line of an earlier one means nothing.
        nonce: String,
        /// Greater than that of every request before.
        number: u64,
        /// Where to.
        host: String,
    },
    /// Processes are slowed.
    Stunned {
        /// How many.
        processes: usize,
        /// How much of their time is taken.
        percent: u32,
    },
    /// No process is slowed.
    Running,
}

impl fmt::Display for ToAgent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hello { nonce, capabilities } => {
                let (nonce, software) = (nonce.as_deref().unwrap_or("-"), env!("CARGO_PKG_VERSION"));
                write!(f, "\nhello {VERSION} {nonce} {capabilities} sterna-guest/{software}\n")
            }
            Self::Migrate { nonce, number, host } => writeln!(f, "migrate {nonce} {number} {host}"),
            Self::Stunned { processes, percent } => writeln!(f, "stunned {processes} {percent}"),
            Self::Running => writeln!(f, "running"),
        }
    }
}

/// Whether a host can have this name.
#[must_use]
pub fn is_name(word: &str) -> bool {
    let usable = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    !word.is_empty() && word.len() <= WORD_MAX && word.chars().all(usable)
}

fn name(word: &str) -> Option<String> {
    is_name(word).then(|| word.to_owned())
}

/// Exactly so many words.
fn words<const N: usize>(text: &str) -> Option<[&str; N]> {
    let words: Vec<&str> = text.split(' ').take(N + 1).collect();
    words.try_into().ok()
}

/// Bytes as they come, lines as they are whole.
#[derive(Debug, Default)]
pub struct Lines {
    begun: Vec<u8>,
    /// The rest of a line that was too long is thrown away.
    overflown: bool,
}

impl Lines {
    /// Takes bytes and returns the lines that they end. Lines that are too long or not printable ASCII are left out.
    pub fn take(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for &byte in bytes {
            if byte == b'\n' {
                let line = std::mem::take(&mut self.begun);
                let whole = !std::mem::take(&mut self.overflown);
                let printable = line.iter().all(|byte| (b' '..=b'~').contains(byte));
                lines.extend(String::from_utf8(line).ok().filter(|l| whole && printable && !l.is_empty()));
            } else if self.begun.len() < LINE_MAX - 1 {
                self.begun.push(byte);
            } else {
                self.overflown = true;
            }
        }
        lines
    }

    /// Forgets what was begun.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_in_whatever_pieces_they_come() {
        let text = b"half a line\n\nhello 1 abc\nstun 50 1000\nunstun\n";
        let expected = ["half a line", "hello 1 abc", "stun 50 1000", "unstun"];
        for size in 1..text.len() {
            let mut lines = Lines::default();
            let found: Vec<String> = text.chunks(size).flat_map(|chunk| lines.take(chunk)).collect();
            assert_eq!(found, expected, "in pieces of {size}");
        }
    }

    #[test]
    fn what_is_too_long_or_odd_is_left_out_and_the_next_line_is_read() {
        let mut lines = Lines::default();
        assert!(lines.take(&vec![b'x'; 1 << 20]).is_empty());
        assert!(lines.begun.len() < LINE_MAX, "it grows with what comes");
        assert_eq!(lines.take(b"\nunstun\n\xff\xfe\na\tb\n\0\n"), ["unstun"]);
        let longest = "x".repeat(LINE_MAX - 1);
        assert_eq!(lines.take(format!("{longest}\n").as_bytes()), [longest]);
    }

    #[test]
    fn orders_are_read() {
        let hello = FromAgent::Hello { version: 1, nonce: "ab".into() };
        assert_eq!(FromAgent::parse("hello 1 ab"), Some(hello));
        assert_eq!(FromAgent::parse("stun 50 900"), Some(FromAgent::Stun { percent: 50, ms: 900 }));
        assert_eq!(FromAgent::parse("unstun"), Some(FromAgent::Unstun));
        let accepted = FromAgent::Accepted { number: 7, migration: "m".into(), host: "b".into() };
        assert_eq!(FromAgent::parse("accepted 7 m b"), Some(accepted));
        let refused = FromAgent::Refused { number: 7, reason: "not to that host".into() };
        assert_eq!(FromAgent::parse("refused 7 not to that host"), Some(refused));
    }

    #[test]
    fn an_order_never_takes_all_or_lasts() {
        let most = FromAgent::Stun { percent: PERCENT_MAX, ms: STUN_MS_MAX };
        assert_eq!(FromAgent::parse("stun 100 4294967295"), Some(most));
    }

    #[test]
    fn what_is_no_order_is_none() {
        let none = [
            "",
            " ",
            "hello",
            "hello 1",
            "hello 1 a b",
            "hello x a",
            "hello 1 a/b",
            "hello -1 a",
            "stun",
            "stun 5",
            "stun 50 900 1",
            "stun -5 1",
            "stun 99999999999 1",
            "unstun now",
            "unstun ",
            "accepted 1 m",
            "accepted m 1 b",
            "refused 1",
            "refused x y",
            "HELLO 1 a",
            "migrate 1 2 3",
        ];
        for line in none {
            assert_eq!(FromAgent::parse(line), None, "{line:?}");
        }
        assert_eq!(FromAgent::parse(&format!("hello 1 {}", "a".repeat(WORD_MAX + 1))), None);
    }
}
