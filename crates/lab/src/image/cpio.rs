//! The archive format of an initramfs: "newc" of cpio, as the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`
//! gives it. Written here because the tool that writes it keeps times and inode numbers, and so never writes the same twice.

/// Archive members begin on multiples of this, and so does their data.
const ALIGN: usize = 4;

/// An archive being written.
#[derive(Debug, Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    members: u32,
}

impl Archive {
    pub(super) fn directory(&mut self, name: &str) {
        self.member(name, 0o040_755, &[]);
    }

    pub(super) fn file(&mut self, name: &str, permissions: u32, content: &[u8]) {
        self.member(name, 0o100_000 | permissions, content);
    }

    pub(super) fn link(&mut self, name: &str, to: &str) {
        self.member(name, 0o120_777, to.as_bytes());
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        self.member("TRAILER!!!", 0, &[]);
        self.bytes
    }

    /// Magic, 13 numbers of 8 hexadecimal digits, the name with its zero, the data; each of the last two padded.
    fn member(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.members += 1;
        let links = if mode & 0o040_000 == 0 { 1 } else { 2 };
        let size = u32::try_from(content.len()).expect("no file of a guest has 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("names are short");
        let fields = [self.members, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        fields.iter().for_each(|f| self.bytes.extend_from_slice(format!("{f:08x}").as_bytes()));
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGN), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn another_implementation_reads_it_back() {
        let mut archive = Archive::default();
        archive.directory("d");
        archive.file("d/odd", 0o644, b"seven b");
        archive.file("d/run", 0o755, b"");
        archive.link("d/link", "odd");
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), archive.finish()).unwrap();
        let unpack =
            Command::new("busybox").args(["cpio", "-i", "-F", "a"]).current_dir(dir.path()).output().unwrap();
        assert!(unpack.status.success(), "{unpack:?}");
        assert_eq!(std::fs::read(dir.path().join("d/link")).unwrap(), b"seven b");
        assert_eq!(std::fs::read(dir.path().join("d/run")).unwrap(), b"");
    }
}
