//! What is said on a guest's port, as the agent writes and reads it (PROTOCOL.md, "The guest's port").
//!
//! What comes from a guest is hostile until it is read here: bounded lines, known words, names that lead nowhere.

use crate::model::GuestHelperView;
use crate::registry::is_usable;
use std::fmt;

/// The version that is spoken. A helper that speaks another says so.
pub(crate) const VERSION: u32 = 1;
/// The longest line with its end, either way.
pub(crate) const LINE_MAX: usize = 512;
/// The most capabilities that a helper may name: there are two.
const CAPABILITIES_MAX: usize = 8;
/// The longest word that is shown to people: a capability, or the helper's name and version.
const SHOWN_MAX: usize = 32;

/// What a guest says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum FromGuest {
    /// Who it is; without a nonce it asks to be greeted.
    Hello { nonce: Option<String>, helper: Helper },
    /// It wants to move.
    Migrate { nonce: String, number: u64, host: String },
    /// So many of its processes are slowed.
    Stunned { processes: u32, percent: u32 },
    /// None is.
    Running,
}

/// A helper inside of a guest, as it presents itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Helper {
    pub(crate) version: u32,
    pub(crate) capabilities: Vec<String>,
    pub(crate) software: String,
}

impl Helper {
    /// Whether it can be asked for this.
    pub(crate) fn can(&self, capability: &str) -> bool {
        self.version >= 1 && self.capabilities.iter().any(|known| known == capability)
    }

    pub(crate) fn view(self) -> GuestHelperView {
        let Self { version, capabilities, software } = self;
        GuestHelperView { version, capabilities, software }
    }
}

impl FromGuest {
    /// Reads a line without its end; nothing if it is none of these.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        if line == "running" {
            return Some(Self::Running);
        }
        let (word, rest) = line.split_once(' ')?;
        match word {
            "hello" => {
                let [version, nonce, capabilities, software] = words(rest)?;
                let nonce = if nonce == "-" { None } else { Some(name(nonce)?) };
                let capabilities: Vec<&str> = capabilities.split(',').take(CAPABILITIES_MAX + 1).collect();
                let shown = |word: &&str| is_shown(word);
                if capabilities.len() > CAPABILITIES_MAX || !capabilities.iter().chain(&[software]).all(shown)
                {
                    return None;
                }
                let capabilities = capabilities.into_iter().map(str::to_owned).collect();
                let helper =
                    Helper { version: number(version)?, capabilities, software: software.to_owned() };
                Some(Self::Hello { nonce, helper })
            }
            "migrate" => {
                let [nonce, counter, host] = words(rest)?;
                Some(Self::Migrate { nonce: name(nonce)?, number: number(counter)?, host: name(host)? })
            }
            "stunned" => {
                let [processes, percent] = words(rest)?;
                let (processes, percent) = (number(processes)?, number(percent)?);
                (percent <= 100).then_some(Self::Stunned { processes, percent })
            }
            _ => None,
        }
    }
}

/// What is said to a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ToGuest<'a> {
    Hello { nonce: &'a str },
    Stun { percent: u32, ms: u32 },
    Unstun,
    Accepted { number: u64, migration: &'a str, host: &'a str },
    Refused { number: u64, reason: &'a str },
}

impl fmt::Display for ToGuest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // The empty line ends what another host's agent had begun.
            Self::Hello { nonce } => write!(f, "\nhello {VERSION} {nonce}\n"),
            Self::Stun { percent, ms } => writeln!(f, "stun {percent} {ms}"),
            Self::Unstun => writeln!(f, "unstun"),
            Self::Accepted { number, migration, host } => writeln!(f, "accepted {number} {migration} {host}"),
            Self::Refused { number, reason } => writeln!(f, "refused {number} {reason}"),
        }
    }
}

/// A line is longer than any that is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooLong;

/// Bytes as they come, lines as they are whole.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    begun: Vec<u8>,
}

impl Lines {
    /// Takes bytes and gives each line that they end to `each`, until that says stop; odd bytes are replaced.
    pub(crate) fn take<E: From<TooLong>>(
        &mut self,
        bytes: &[u8],
        mut each: impl FnMut(&str) -> Result<(), E>,
    ) -> Result<(), E> {
        for &byte in bytes {
            if byte == b'\n' {
                let line = std::mem::take(&mut self.begun);
                each(&String::from_utf8_lossy(&line))?;
            } else if self.begun.len() < LINE_MAX - 1 {
                self.begun.push(byte);
            } else {
                return Err(TooLong.into());
            }
        }
        Ok(())
    }
}

fn name(word: &str) -> Option<String> {
    is_usable(word).then(|| word.to_owned())
}

/// Digits and nothing else: Rust would take a sign as well.
fn number<T: std::str::FromStr>(word: &str) -> Option<T> {
    word.bytes().all(|byte| byte.is_ascii_digit()).then(|| word.parse().ok()).flatten()
}

fn is_shown(word: &str) -> bool {
    let usable = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '/' | '+');
    !word.is_empty() && word.len() <= SHOWN_MAX && word.chars().all(usable)
}

/// Exactly so many words.
fn words<const N: usize>(text: &str) -> Option<[&str; N]> {
    let words: Vec<&str> = text.split(' ').take(N + 1).collect();
    words.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use sterna_guest::helper::line as guest;

    fn parse(line: &str) -> Option<FromGuest> {
        FromGuest::parse(line)
    }

    #[test]
    fn what_the_helper_writes_is_read() {
        let written = |message: guest::ToAgent| {
            let text = message.to_string();
            let mut found = Vec::new();
            let mut lines = Lines::default();
            lines
                .take::<TooLong>(text.as_bytes(), |line| {
                    found.extend(parse(line));
                    Ok(())
                })
                .unwrap();
            assert_eq!(found.len(), 1, "{text:?}");
            found.remove(0)
        };
        for nonce in [None, Some("abc".to_owned())] {
            let FromGuest::Hello { nonce: read, helper } =
                written(guest::ToAgent::Hello { nonce: nonce.clone(), capabilities: "migrate,stun" })
            else {
                panic!("it is another message");
            };
            assert_eq!(read, nonce);
            assert!(helper.can("stun") && helper.can("migrate") && !helper.can("fly"), "{helper:?}");
            assert_eq!(helper.version, VERSION);
        }
        let request = guest::ToAgent::Migrate { nonce: "n".into(), number: 7, host: "hostb".into() };
        assert_eq!(
            written(request),
            FromGuest::Migrate { nonce: "n".into(), number: 7, host: "hostb".into() }
        );
        let stunned = guest::ToAgent::Stunned { processes: 3, percent: 50 };
        assert_eq!(written(stunned), FromGuest::Stunned { processes: 3, percent: 50 });
        assert_eq!(written(guest::ToAgent::Running), FromGuest::Running);
    }

    #[test]
    fn what_the_agent_writes_the_helper_reads() {
        let read = |message: ToGuest<'_>| {
            let lines = guest::Lines::default().take(message.to_string().as_bytes());
            assert_eq!(lines.len(), 1, "{lines:?}");
            guest::FromAgent::parse(&lines[0]).unwrap()
        };
        let hello = guest::FromAgent::Hello { version: VERSION, nonce: "n".into() };
        assert_eq!(read(ToGuest::Hello { nonce: "n" }), hello);
        let stun = guest::FromAgent::Stun { percent: 50, ms: 2000 };
        assert_eq!(read(ToGuest::Stun { percent: 50, ms: 2000 }), stun);
        assert_eq!(read(ToGuest::Unstun), guest::FromAgent::Unstun);
        let accepted = guest::FromAgent::Accepted { number: 1, migration: "m".into(), host: "b".into() };
        assert_eq!(read(ToGuest::Accepted { number: 1, migration: "m", host: "b" }), accepted);
        let refused = guest::FromAgent::Refused { number: 1, reason: "not there".into() };
        assert_eq!(read(ToGuest::Refused { number: 1, reason: "not there" }), refused);
        assert_eq!((guest::VERSION, guest::LINE_MAX), (VERSION, LINE_MAX));
    }

    #[test]
    fn what_is_not_meant_is_none() {
        for line in [
            "",
            " ",
            "hello",
            "hello 1 n migrate",
            "hello 1 n migrate s x",
            "hello +1 n migrate s",
            "hello 1 ../n m s",
            "hello 1 n a,b,c,d,e,f,g,h,i s",
            "hello 1 n ,m s",
            "hello 1 n m \u{1b}[31m",
            "hello 99999999999 n m s",
            "migrate n 1",
            "migrate n 1 ../../etc",
            "migrate n 1 b c",
            "migrate n -1 b",
            "migrate - 1 b",
            "migrate n 18446744073709551616 b",
            "migrate  1 b",
            "stunned 1 101",
            "stunned 1",
            "running 1",
            "Running",
        ] {
            assert_eq!(parse(line), None, "{line:?}");
        }
        assert_eq!(parse(&format!("migrate n 1 {}", "b".repeat(65))), None);
    }

    /// The document is what others implement.
    #[test]
    fn the_protocol_document_says_the_same() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../PROTOCOL.md");
        let text = std::fs::read_to_string(path).unwrap();
        let said = |line: String| {
            let word = line.trim().split(' ').next().unwrap().to_owned();
            assert!(text.contains(&format!("| `{word}")), "PROTOCOL.md does not tell of {word}");
        };
        said(ToGuest::Hello { nonce: "n" }.to_string());
        said(ToGuest::Stun { percent: 1, ms: 1 }.to_string());
        said(ToGuest::Unstun.to_string());
        said(ToGuest::Accepted { number: 1, migration: "m", host: "h" }.to_string());
        said(ToGuest::Refused { number: 1, reason: "r" }.to_string());
        said(guest::ToAgent::Migrate { nonce: "n".into(), number: 1, host: "h".into() }.to_string());
        said(guest::ToAgent::Stunned { processes: 1, percent: 1 }.to_string());
        said(guest::ToAgent::Running.to_string());
        let limits = [
            ("LINE_MAX", LINE_MAX as u64),
            ("BURST", u64::from(super::super::bucket::BURST)),
            ("CUT_OFF", super::super::link::CUT_OFF.as_secs()),
            ("PERCENT_MAX", u64::from(guest::PERCENT_MAX)),
            ("STUN_MS_MAX", u64::from(guest::STUN_MS_MAX)),
        ];
        for (name, value) in limits {
            assert!(text.contains(&format!("| {name} | {value} |")), "PROTOCOL.md: {name} is not {value}");
        }
    }

    #[test]
    fn an_older_helper_is_asked_for_nothing() {
        let Some(FromGuest::Hello { helper, .. }) = parse("hello 0 n migrate,stun old/0") else {
            panic!("an older version may greet");
        };
        assert!(!helper.can("stun"));
    }

    proptest! {
        /// Whatever comes, in whatever pieces: no panic, and never more than a line is kept.
        #[test]
        fn nothing_grows_or_panics(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..700), 0..20)) {
            let mut lines = Lines::default();
            for piece in pieces {
                let taken = lines.take::<TooLong>(&piece, |line| {
                    prop_assert_line(line);
                    Ok(())
                });
                prop_assert!(lines.begun.len() < LINE_MAX);
                if taken.is_err() {
                    break;
                }
            }
        }

        /// Nearly right lines too: each message with a word changed.
        #[test]
        fn nearly_right_lines_do_not_panic(
            word in "hello|migrate|stunned|running",
            rest in prop::collection::vec("[ -~]{0,20}|[0-9]{1,25}|-|[a-z,]{1,40}", 0..6),
        ) {
            prop_assert_line(&format!("{word} {}", rest.join(" ")));
        }

        /// A request that is read is the one that was written.
        #[test]
        fn requests_survive(nonce in "[a-f0-9]{32}", number in any::<u64>(), host in "[a-z][a-z0-9.-]{0,60}") {
            let line = format!("migrate {nonce} {number} {host}");
            prop_assert_eq!(parse(&line), Some(FromGuest::Migrate { nonce, number, host }));
        }
    }

    /// What is taken has names that lead nowhere.
    fn prop_assert_line(line: &str) {
        match parse(line) {
            Some(FromGuest::Migrate { nonce, host, .. }) => assert!(is_usable(&nonce) && is_usable(&host)),
            Some(FromGuest::Hello { helper, .. }) => {
                assert!(helper.capabilities.len() <= CAPABILITIES_MAX && is_shown(&helper.software));
            }
            _ => {}
        }
    }
}
