//! Memory that many processes map copy-on-write and none can change: a template.
//!
//! A memfd that is sealed against writes. A private mapping of a plain file is not enough: a guest's balloon, and its reporting of free
//! pages, make QEMU punch holes into the *file*, and the next clone finds zeros. The seal refuses that (memfd_create(2), fcntl(2)).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use crate::page::PAGE;

/// A template's memory, being filled or sealed.
#[derive(Debug)]
pub struct SealedMemory {
    file: File,
}

impl SealedMemory {
    /// Zeros, so many bytes of them: nothing is allocated yet.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(name: &str, bytes: u64) -> io::Result<Self> {
        let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        let file = File::from(fd);
        file.set_len(bytes.next_multiple_of(PAGE))?;
        Ok(Self { file })
    }

    /// Writes content, as long as it is not sealed.
    ///
    /// # Errors
    /// What the kernel says: EPERM once it is sealed.
    pub fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    /// From here on nobody changes it, neither content nor length nor seals.
    ///
    /// # Errors
    /// What the kernel says: EBUSY while somebody has it mapped shared and writable.
    pub fn seal(&self) -> io::Result<()> {
        let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        Ok(fcntl_add_seals(&self.file, seals)?)
    }

    /// The memfd, to be handed to a process that is started.
    pub fn file(&self) -> &File {
        &self.file
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{FallocateFlags, fallocate};

    #[test]
    fn what_is_sealed_stays_as_it_is() {
        let memory = SealedMemory::new("template", 3 * PAGE).unwrap();
        memory.write(&[7; PAGE as usize], PAGE).unwrap();
        memory.seal().unwrap();
        assert!(memory.write(&[8], PAGE).is_err());
        assert!(memory.file().set_len(PAGE).is_err() && memory.file().set_len(9 * PAGE).is_err());
        // What a balloon does, through a descriptor of its own that may write.
        let own = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(memory.file())));
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        assert!(fallocate(own.unwrap(), hole, PAGE, PAGE).is_err());
        let mut page = [0; PAGE as usize];
        memory.file().read_exact_at(&mut page, PAGE).unwrap();
        assert_eq!(page, [7; PAGE as usize]);
    }
}
