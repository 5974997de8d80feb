//! Huge pages of the machine, reserved for a test and given back.

use std::fs::File;

/// How many huge pages the machine keeps (Documentation/admin-guide/mm/hugetlbpage.rst).
const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// Huge pages of 2 MiB that are reserved as long as this lives, beside those that others have reserved.
pub struct Pool(u64);

impl Pool {
    pub fn reserve(pages: u64) -> Pool {
        let (before, now) = change(|pool| pool + pages);
        let pool = Pool(now.saturating_sub(before));
        assert!(pool.0 >= pages, "the machine's memory is in pieces: {now} huge pages of {}", before + pages);
        pool
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        change(|pool| pool.saturating_sub(self.0));
    }
}

/// Changes the number of pages; what it was and is. Tests in other processes take turns.
fn change(to: impl FnOnce(u64) -> u64) -> (u64, u64) {
    let turn = File::create(std::env::temp_dir().join("sterna-test-huge-pages.lock")).unwrap();
    turn.lock().unwrap();
    let pages = || std::fs::read_to_string(POOL).unwrap().trim().parse::<u64>().unwrap();
    let before = pages();
    std::fs::write(POOL, to(before).to_string()).unwrap();
    (before, pages())
}
