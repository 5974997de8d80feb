//! Options of `sterna migrate` that rows ask for, all in one place, and what is said where this Sterna lacks one.
//!
//! A row is about a way of moving, and not about the words for it: where the words are not known yet it runs without them, and
//! says so.

use std::process::Command;
use std::time::Duration;

use sterna_lab::run;

use crate::Kit;
use crate::ours::Order;

/// Help is printed at once.
const HELP: Duration = Duration::from_secs(20);

/// Something that a move shall do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// The rate of the first round, in Mbit/s: later ones are as fast as the guest writes, and somewhat faster.
    MinBandwidth(u32),
    /// The highest rate, in Mbit/s.
    MaxBandwidth(u32),
    /// To hold up a guest that writes faster than the link carries.
    AutoConverge,
    /// To send what changed of a page, with so many MiB for the pages as they were; 0 is not to.
    DeltaCache(u32),
    /// `none`, `lz4`, `zstd` or `auto`.
    Compression(&'static str),
    /// To take back what the guest does not need.
    Balloon,
    /// To run at the target at once, and to fetch all memory from there.
    Postcopy,
    /// The same after a round of pre-copy, for what was written meanwhile.
    PostcopyAfterPrecopy,
}

impl Wish {
    /// The option, as the command's help has it.
    #[must_use]
    pub fn option(self) -> &'static str {
        match self {
            Wish::MinBandwidth(_) => "--min-bandwidth",
            Wish::MaxBandwidth(_) => "--bandwidth",
            Wish::AutoConverge => "--auto-converge",
            Wish::DeltaCache(_) => "--delta-cache",
            Wish::Compression(_) => "--compression",
            Wish::Balloon => "--balloon",
            Wish::Postcopy => "--postcopy",
            Wish::PostcopyAfterPrecopy => "--postcopy-after-precopy",
        }
    }

    fn value(self) -> Option<String> {
        match self {
            Wish::MinBandwidth(mbit) | Wish::MaxBandwidth(mbit) => Some(format!("{mbit}Mbit/s")),
            Wish::DeltaCache(mib) => Some(format!("{mib}MiB")),
            Wish::Compression(way) => Some(way.to_owned()),
            Wish::AutoConverge | Wish::Balloon | Wish::Postcopy | Wish::PostcopyAfterPrecopy => None,
        }
    }
}

/// What a `sterna migrate` can be asked for.
#[derive(Debug, Clone, Default)]
pub struct Abilities {
    help: String,
}

/// What is asked for in the end.
#[derive(Debug, Clone, Default)]
pub struct Granted {
    /// The options that there are.
    pub order: Order,
    /// Those that there are not.
    pub missing: Vec<&'static str>,
}

impl Abilities {
    /// Of the command that is measured, by its help. One that cannot even print it will be heard of when it shall move a VM.
    #[must_use]
    pub fn of(kit: &Kit) -> Abilities {
        let mut command = Command::new(&kit.sterna);
        Abilities { help: run::output(command.args(["migrate", "--help"]), HELP).unwrap_or_default() }
    }

    fn has(&self, option: &str) -> bool {
        let words = self.help.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
        words.into_iter().any(|word| word == option)
    }

    /// All of it that can be had.
    #[must_use]
    pub fn grant(&self, wishes: &[Wish]) -> Granted {
        let mut granted = Granted::default();
        for wish in wishes {
            match self.has(wish.option()) {
                true => {
                    granted.order.options.push(wish.option().to_owned());
                    granted.order.options.extend(wish.value());
                }
                false => granted.missing.push(wish.option()),
            }
        }
        granted
    }
}

impl Granted {
    /// Whether this was granted.
    #[must_use]
    pub fn has(&self, wish: Wish) -> bool {
        self.order.options.iter().any(|o| o == wish.option())
    }

    /// Why that cannot be measured which is about these options and nothing else; none where they are all there.
    #[must_use]
    pub fn lack(&self) -> Option<String> {
        let missing = self.missing.join(", ");
        (!missing.is_empty()).then(|| format!("this `sterna migrate` has no {missing}"))
    }

    /// What a reader must know of it.
    #[must_use]
    pub fn note(&self) -> String {
        let options = match self.order.options.as_slice() {
            [] => "no option of its own".to_owned(),
            options => options.join(" "),
        };
        match self.missing.as_slice() {
            [] => format!("Ours was asked for with {options}."),
            missing => format!(
                "This `sterna migrate` has no {}: ours ran WITHOUT, with {options}. Its figures are not those of the goals' way.",
                missing.join(", ")
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn abilities() -> Abilities {
        let help = "      --bandwidth <RATE>\n  Most bytes\n      --auto-converge, --stun\n      --delta-cache-x <SIZE>";
        Abilities { help: help.to_owned() }
    }

    #[test]
    fn only_what_the_help_names_is_asked_for_and_the_rest_is_said() {
        let wishes =
            [Wish::MaxBandwidth(500), Wish::MinBandwidth(100), Wish::AutoConverge, Wish::DeltaCache(64)];
        let granted = abilities().grant(&wishes);
        assert_eq!(granted.order.options, ["--bandwidth", "500Mbit/s", "--auto-converge"]);
        assert_eq!(granted.missing, ["--min-bandwidth", "--delta-cache"]);
        assert!(granted.has(Wish::AutoConverge) && !granted.has(Wish::Balloon));
        assert!(granted.note().contains("has no --min-bandwidth, --delta-cache: ours ran WITHOUT"));
    }

    #[test]
    fn an_option_that_another_begins_with_is_not_taken_for_it() {
        let abilities = Abilities { help: "--postcopy-after-precopy  Post-copy".to_owned() };
        assert_eq!(abilities.grant(&[Wish::PostcopyAfterPrecopy]).lack(), None);
        let lack = abilities.grant(&[Wish::Postcopy]).lack();
        assert_eq!(lack.as_deref(), Some("this `sterna migrate` has no --postcopy"));
    }

    #[test]
    fn where_all_is_there_nothing_is_missed() {
        let granted = abilities().grant(&[Wish::AutoConverge]);
        assert_eq!(granted.note(), "Ours was asked for with --auto-converge.");
        assert!(Abilities::default().grant(&[Wish::Compression("lz4")]).note().contains("no --compression"));
    }
}
