//! Which pages may be the same.

use super::gang::Member;
use crate::control::explain;
use crate::model::Dedup;
use std::panic::resume_unwind;
use sterna_engine::wire::batch::PAYLOAD_BYTES_MAX;
use sterna_memory::{Backing, PAGE, PageRun, Reader, frames, touch_common};
use xxhash_rust::xxh3::xxh3_64;

/// Marks keys that are hashes: numbers of frames do not have this bit.
const OF_HASH: u64 = 1 << 63;

/// A page of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) member: u16,
    /// Index of the block among those that travel.
    pub(super) block: u16,
    pub(super) page: u32,
}

/// Pages that are the same, if their bytes say so too: group by group, each in order of place, the groups in order of their first places. So
/// what lies together in the first VM lies together in the store, and where others have the same order, there are few runs.
#[derive(Debug, Default)]
pub(super) struct Groups {
    places: Vec<Place>,
    ends: Vec<u32>,
}

impl Groups {
    /// How many contents there are.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The pages of one.
    pub(super) fn get(&self, group: usize) -> &[Place] {
        let from = group.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.places[from as usize..self.ends[group] as usize]
    }

    fn push(&mut self, places: impl IntoIterator<Item = Place>) {
        let from = self.places.len();
        self.places.extend(places);
        match self.places.len() - from {
            0 => {}
            1 => self.places.truncate(from),
            _ => self.ends.push(self.places.len() as u32),
        }
    }

    /// Of pages with a key each those that have one with others.
    fn of_keys(mut keyed: Vec<(u64, Place)>) -> Self {
        keyed.sort_unstable();
        let mut groups: Vec<&[(u64, Place)]> =
            keyed.chunk_by(|one, next| one.0 == next.0).filter(|group| group.len() > 1).collect();
        groups.sort_unstable_by_key(|group| group[0].1);
        let mut out = Self::default();
        groups.into_iter().for_each(|group| out.push(group.iter().map(|(_, place)| *place)));
        out
    }

    /// Without the pages that `keep` does not want; a page that is left alone is in no group.
    pub(super) fn retain(&self, mut keep: impl FnMut(Place) -> bool) -> Self {
        let mut out = Self::default();
        for group in 0..self.len() {
            out.push(self.get(group).iter().copied().filter(|place| keep(*place)));
        }
        out
    }
}

/// Finds the pages of all members that may be the same. A member that cannot be looked at has none.
pub(super) fn find(members: &[Member]) -> Groups {
    // All of them before the first is looked at: what only one has mapped looks as if it were its own.
    of_each(members, |_, member| touch(member));
    let keyed = of_each(members, |at, member| {
        keys(at, member).unwrap_or_else(|why| {
            tracing::warn!(vm = member.vm, why, "nothing of the VM is shared");
            Vec::new()
        })
    });
    Groups::of_keys(keyed.into_iter().flatten().collect())
}

/// Looks at all members, several at once, and returns what was seen in their order.
fn of_each<T: Send>(members: &[Member], look: impl Fn(u16, &Member) -> T + Sync) -> Vec<T> {
    let at_once = std::thread::available_parallelism().map_or(1, usize::from);
    let of = |first: usize, some: &[Member]| {
        (first..).zip(some).map(|(at, member)| look(at as u16, member)).collect::<Vec<T>>()
    };
    let each = members.len().div_ceil(at_once).max(1);
    let of = &of;
    std::thread::scope(|scope| {
        let begin = |(part, some): (usize, _)| {
            let named = std::thread::Builder::new().name("alike".into());
            named.spawn_scoped(scope, move || of(part * each, some)).map_err(|_| (part, some))
        };
        let looks: Vec<_> = members.chunks(each).enumerate().map(begin).collect();
        let seen = looks.into_iter().flat_map(|look| match look {
            Ok(look) => look.join().unwrap_or_else(|panic| resume_unwind(panic)),
            // No thread can be had.
            Err((part, some)) => of(part * each, some),
        });
        seen.collect()
    })
}

/// Has the kernel map what a member has in common with others already: a page that is not mapped has no frame.
fn touch(member: &Member) {
    if member.dedup != Dedup::Frames {
        return;
    }
    let common = member.blocks.iter().filter(|block| !block.common.is_empty());
    if let Err(why) =
        touch_common(&member.process, common.map(|block| (block.region, block.common.as_slice())))
    {
        tracing::warn!(vm = member.vm, %why, "less of the VM is shared");
    }
}

fn keys(at: u16, member: &Member) -> Result<Vec<(u64, Place)>, String> {
    let mut keyed = Vec::new();
    for (index, (block, pages)) in (0..).zip(member.blocks.iter().zip(&member.pages)) {
        let place = |page: u64| Place { member: at, block: index, page: page as u32 };
        // What others map too, as `share=on` is for, cannot be mapped privately; nor can a part of a huge page. What is larger has more pages
        // than a place can name.
        let plain = matches!(block.backing, Backing::Anonymous | Backing::Template);
        if !plain || block.region.pages() > u64::from(u32::MAX) {
            continue;
        }
        if member.dedup == Dedup::Hash {
            hashes(member, block.region, pages, |page, hash| keyed.push((hash | OF_HASH, place(page))))?;
            continue;
        }
        let found = frames(&member.process, &block.region, pages, |page, frame| {
            keyed.push((frame, place(page)));
        });
        found.map_err(|why| explain(&why))?;
    }
    Ok(keyed)
}

fn hashes(
    member: &Member,
    region: sterna_memory::Region,
    pages: &[PageRun],
    mut found: impl FnMut(u64, u64),
) -> Result<(), String> {
    let reader = Reader::gentle(&member.process).map_err(|why| explain(&why))?;
    let mut buffer = vec![0; PAYLOAD_BYTES_MAX];
    for run in pages.iter().flat_map(|run| crate::fit::pieces(*run)) {
        let bytes = &mut buffer[..run.bytes() as usize];
        reader.read(&[region.span(run)], bytes).map_err(|why| explain(&why))?;
        for (page, content) in (run.first..).zip(bytes.chunks_exact(PAGE as usize)) {
            found(page, xxh3_64(content));
        }
    }
    Ok(())
}

/// Pages whose runs a target has no room for, so that as many pages as can be are shared: those of the shortest runs. What of each member
/// may be kept.
pub(super) struct Fit {
    /// For each member the places that are not mapped, ascending.
    dropped: Vec<Vec<Place>>,
}

impl Fit {
    /// Whether a place is mapped.
    pub(super) fn has(&self, place: Place) -> bool {
        self.dropped[usize::from(place.member)].binary_search(&place).is_err()
    }

    /// Whether there is room for all.
    pub(super) fn is_all(&self) -> bool {
        self.dropped.iter().all(Vec::is_empty)
    }

    /// How many pages of a member are not.
    pub(super) fn fallbacks(&self, member: usize) -> u64 {
        self.dropped[member].len() as u64
    }
}

/// Chooses what is mapped, where each member has room for so many runs.
pub(super) fn fit(groups: &Groups, rooms: &[u32]) -> Fit {
    let mut placed: Vec<Vec<(Place, u32)>> = vec![Vec::new(); rooms.len()];
    for group in 0..groups.len() {
        for place in groups.get(group) {
            placed[usize::from(place.member)].push((*place, group as u32));
        }
    }
    let of = |(mut places, room): (Vec<(Place, u32)>, &u32)| {
        places.sort_unstable();
        let mut runs: Vec<&[(Place, u32)]> = places.chunk_by(|one, next| follows(*one, *next)).collect();
        let room = *room as usize;
        if runs.len() <= room {
            return Vec::new();
        }
        runs.sort_by_key(|run| std::cmp::Reverse(run.len()));
        let mut dropped: Vec<Place> =
            runs[room..].iter().flat_map(|run| run.iter().map(|(place, _)| *place)).collect();
        dropped.sort_unstable();
        dropped
    };
    Fit { dropped: placed.into_iter().zip(rooms).map(of).collect() }
}

/// Whether a page and its place in the store come right after another's.
pub(super) fn follows(one: (Place, u32), next: (Place, u32)) -> bool {
    one.0.block == next.0.block && one.0.page + 1 == next.0.page && one.1 + 1 == next.1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(member: u16, page: u32) -> Place {
        Place { member, block: 0, page }
    }

    fn keyed(pages: &[(u64, u16, u32)]) -> Vec<(u64, Place)> {
        pages.iter().map(|&(key, member, page)| (key, place(member, page))).collect()
    }

    fn all(groups: &Groups) -> Vec<Vec<(u16, u32)>> {
        let of = |group| groups.get(group).iter().map(|place| (place.member, place.page)).collect();
        (0..groups.len()).map(of).collect()
    }

    #[test]
    fn pages_with_one_key_are_a_group_and_groups_are_in_the_first_vms_order() {
        let groups =
            Groups::of_keys(keyed(&[(9, 0, 1), (3, 0, 2), (9, 1, 7), (3, 1, 8), (3, 1, 9), (5, 0, 3)]));
        assert_eq!(all(&groups), [vec![(0, 1), (1, 7)], vec![(0, 2), (1, 8), (1, 9)]]);
        let less = groups.retain(|place| place.page != 7);
        assert_eq!(all(&less), [vec![(0, 2), (1, 8), (1, 9)]]);
        assert_eq!(all(&Groups::default()), Vec::<Vec<(u16, u32)>>::new());
    }
}
