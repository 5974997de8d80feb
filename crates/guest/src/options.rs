//! Options `--name=value` and `--flag`, few enough to need no parser of the world's.

use std::collections::BTreeMap;

/// The options of a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options(BTreeMap<String, String>);

impl Options {
    /// Reads options; each must be known.
    pub fn parse(arguments: impl Iterator<Item = String>, known: &[&str]) -> Result<Options, String> {
        let mut options = BTreeMap::new();
        for argument in arguments {
            let text = argument.strip_prefix("--").ok_or(format!("`{argument}` is no option"))?;
            let (name, value) = text.split_once('=').unwrap_or((text, ""));
            if !known.contains(&name) {
                return Err(format!("no option `--{name}`; there are --{}", known.join(", --")));
            }
            options.insert(name.to_owned(), value.to_owned());
        }
        Ok(Options(options))
    }

    /// A number, or the given one when the option is absent.
    pub fn number(&self, name: &str, default: u64) -> Result<u64, String> {
        match self.0.get(name) {
            None => Ok(default),
            Some(text) => text.parse().map_err(|_| format!("--{name}={text} is no number")),
        }
    }

    /// A word, or the given one.
    #[must_use]
    pub fn word<'a>(&'a self, name: &str, default: &'a str) -> &'a str {
        self.0.get(name).map_or(default, String::as_str)
    }

    /// Whether the option is there.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Options, String> {
        Options::parse(words.iter().map(|w| (*w).to_owned()), &["fill", "check"])
    }

    #[test]
    fn values_and_flags() {
        let options = parse(&["--fill=7", "--check"]).unwrap();
        assert_eq!(options.number("fill", 1), Ok(7));
        assert_eq!(options.number("other", 3), Ok(3));
        assert!(options.has("check"));
    }

    #[test]
    fn mistakes_are_named() {
        assert!(parse(&["fill"]).unwrap_err().contains("`fill`"));
        assert!(parse(&["--fil=1"]).unwrap_err().contains("--fill"));
        assert!(parse(&["--fill=x"]).unwrap().number("fill", 0).unwrap_err().contains("--fill=x"));
    }
}
