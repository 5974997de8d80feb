//! How small a guest is made before it is moved: its page cache is what it can do without (Clark et al., NSDI 2005, section 5.4,
//! "freeing page cache pages").

use crate::units::Bytes;

/// What is left to the guest of what it could do without, as a part of its memory and at least.
const RESERVE_PART: u64 = 16;
const RESERVE_MIN: Bytes = Bytes(64 << 20);
/// Less than this is not worth the guest's work.
const WORTH: Bytes = Bytes(16 << 20);

/// What a guest says of its memory (virtio 1.2, section 5.5.6.3, statistics of the memory balloon).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestMemory {
    /// What it has now.
    pub actual: Bytes,
    /// What it could give away without swapping: free pages, and most of its page cache.
    pub available: Bytes,
}

/// The size that the guest is asked to shrink to; none where that would gain nothing.
pub fn shrunk(guest: GuestMemory) -> Option<Bytes> {
    let reserve = (guest.actual.0 / RESERVE_PART).max(RESERVE_MIN.0);
    let spare = guest.available.0.min(guest.actual.0).saturating_sub(reserve);
    (spare >= WORTH.0).then(|| Bytes(guest.actual.0 - spare))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_guest_keeps_what_it_uses_and_a_reserve() {
        let guest = |actual, available| GuestMemory {
            actual: Bytes(actual * MIB),
            available: Bytes(available * MIB),
        };
        assert_eq!(shrunk(guest(512, 400)), Some(Bytes(176 * MIB)));
        assert_eq!(shrunk(guest(4096, 3000)), Some(Bytes((4096 - 3000 + 256) * MIB)));
        assert_eq!(shrunk(guest(512, 70)), None, "hardly anything");
        assert_eq!(shrunk(guest(512, 4000)), Some(Bytes(64 * MIB)), "a guest that boasts keeps its reserve");
    }

    proptest! {
        #[test]
        fn a_guest_never_grows_and_never_loses_all(actual in any::<u64>(), available in any::<u64>()) {
            if let Some(size) = shrunk(GuestMemory { actual: Bytes(actual), available: Bytes(available) }) {
                prop_assert!(size.0 < actual && size.0 >= (actual / RESERVE_PART).max(RESERVE_MIN.0).min(actual));
            }
        }
    }
}
