//! How the content of a page gets to the target: the cheapest way that the target can resolve. What a page is sent as is settled in this
//! order, the cheapest first; [`Reference`] is closed, so that whoever counts or shows them misses none.
//!
//! | reference | settled by | resolved at the target by |
//! |---|---|---|
//! | [`Reference::Zero`] | the page tables, or a look at the bytes | nothing: it is zero there, or is dropped |
//! | [`Reference::Template`] | the page tables: the page is no private copy | its mapping of the template |
//! | [`Reference::Common`] | the page tables and a comparison, before the first round | its mapping of a store |
//! | [`Reference::Patch`] | what was sent of the page before | what is there, changed |
//! | [`Reference::Bytes`] | | the stream |

/// What a page travels as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reference {
    /// Nothing: it is zero, a hole, or at the target as it is.
    Zero,
    /// Its place in the VM's template.
    Template,
    /// A place in a store of what several VMs have in common.
    Common,
    /// What has changed since it was sent.
    Patch,
    /// All of it, compressed or not.
    Bytes,
}

impl Reference {
    /// All of them, the cheapest first.
    pub const ALL: [Self; 5] = [Self::Zero, Self::Template, Self::Common, Self::Patch, Self::Bytes];

    /// Its name for scripts.
    pub fn word(self) -> &'static str {
        match self {
            Self::Zero => "zero",
            Self::Template => "template",
            Self::Common => "common",
            Self::Patch => "patch",
            Self::Bytes => "bytes",
        }
    }
}
