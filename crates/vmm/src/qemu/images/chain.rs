//! The files that an image leads to by itself: QEMU opens whatever a qcow2 image's header names, unchecked.
//!
//! Only the header is read (docs/interop/qcow2.txt), and only of images that are said to be qcow2: what a guest writes
//! into a raw image may look like a header.

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::lock::ImageFile;

/// `QFI\xfb`.
const MAGIC: [u8; 4] = *b"QFI\xfb";
/// The longest name that a header may hold.
const NAME_BYTES_MAX: u32 = 1023;
/// How many images may lie over one another: tools merge them long before.
const DEPTH_MAX: usize = 64;
/// The smallest cluster, which the header and its extensions fit into.
const HEADER_BYTES: usize = 4096;
/// The incompatible feature "data is in another file".
const DATA_ELSEWHERE: u64 = 1 << 2;
/// The header extension that holds the format of the backing file.
const BACKING_FORMAT: u32 = 0xe279_2aca;

/// Every image below `path`, the nearest first.
pub(super) fn below(path: &Path) -> Result<Vec<PathBuf>, String> {
    let mut found: Vec<PathBuf> = Vec::new();
    let mut at = path.to_owned();
    while let Some((next, format)) = backing(&at)? {
        if found.len() == DEPTH_MAX {
            return Err("too many images lie over one another; merge some".to_owned());
        }
        found.push(next.clone());
        match format.as_deref() {
            None | Some("qcow2") => at = next,
            Some("raw") => break,
            Some(other) => return Err(format!("its backing file has format {other}; use qcow2 or raw")),
        }
    }
    Ok(found)
}

/// The file below one image, with its format.
fn backing(path: &Path) -> Result<Option<(PathBuf, Option<String>)>, String> {
    let odd = |what: &str| format!("{}: {what}", path.display());
    let image = ImageFile::open(path).map_err(|why| odd(&why))?;
    let mut header = vec![0; HEADER_BYTES.min(image.bytes as usize)];
    image.file().read_exact_at(&mut header, 0).map_err(|why| odd(&why.to_string()))?;
    if header.get(..4) != Some(&MAGIC) {
        return Ok(None);
    }
    let (at, bytes) = (number64(&header, 8), number32(&header, 16));
    if number32(&header, 4) >= 3 && number64(&header, 72) & DATA_ELSEWHERE != 0 {
        return Err(odd("its data is in another file; convert it to one file (qemu-img convert)"));
    }
    if at == 0 || bytes == 0 {
        return Ok(None);
    }
    if bytes > NAME_BYTES_MAX {
        return Err(odd("its header is damaged"));
    }
    let mut name = vec![0; bytes as usize];
    image.file().read_exact_at(&mut name, at).map_err(|why| odd(&why.to_string()))?;
    let name = String::from_utf8(name).map_err(|_| odd("its backing file has an odd name"))?;
    let name = name.strip_prefix("file:").unwrap_or(&name);
    // QEMU takes what stands before a colon for a protocol, if no slash comes before it (`path_has_protocol`).
    if name.split('/').next().is_some_and(|first| first.contains(':')) {
        return Err(odd(&format!("its backing file {name} is no file of the host")));
    }
    let folder = path.parent().unwrap_or(Path::new("/"));
    Ok(Some((folder.join(name), extension(&header))))
}

/// The format of the backing file, where the header tells it.
fn extension(header: &[u8]) -> Option<String> {
    let mut at = if number32(header, 4) >= 3 { number32(header, 100) as usize } else { 72 };
    while at + 8 <= header.len() {
        let (kind, bytes) = (number32(header, at), number32(header, at + 4) as usize);
        let end = at.checked_add(8)?.checked_add(bytes)?;
        match kind {
            0 => return None,
            BACKING_FORMAT => return String::from_utf8(header.get(at + 8..end)?.to_vec()).ok(),
            _ => at = end.checked_next_multiple_of(8)?,
        }
    }
    None
}

/// A big-endian number; 0 beyond the end.
fn number32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|four| four.try_into().ok()).map_or(0, u32::from_be_bytes)
}

fn number64(bytes: &[u8], at: usize) -> u64 {
    u64::from(number32(bytes, at)) << 32 | u64::from(number32(bytes, at + 4))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A header of version 3 with a backing file and its format.
    pub(in super::super) fn header(name: &str, format: &str, features: u64) -> Vec<u8> {
        let mut bytes = vec![0; 1024];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..8].copy_from_slice(&3u32.to_be_bytes());
        bytes[8..16].copy_from_slice(&512u64.to_be_bytes());
        bytes[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
        bytes[72..80].copy_from_slice(&features.to_be_bytes());
        bytes[100..104].copy_from_slice(&104u32.to_be_bytes());
        if !format.is_empty() {
            bytes[104..108].copy_from_slice(&BACKING_FORMAT.to_be_bytes());
            bytes[108..112].copy_from_slice(&(format.len() as u32).to_be_bytes());
            bytes[112..112 + format.len()].copy_from_slice(format.as_bytes());
        }
        bytes[512..512 + name.len()].copy_from_slice(name.as_bytes());
        bytes
    }

    #[test]
    fn each_image_below_is_found_once_and_a_raw_one_ends_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("top"), header("middle", "qcow2", 0)).unwrap();
        std::fs::write(path("middle"), header(path("base").to_str().unwrap(), "raw", 0)).unwrap();
        // What a guest wrote: QEMU does not look, and neither do we.
        std::fs::write(path("base"), header("/etc/shadow", "raw", 0)).unwrap();
        assert_eq!(below(&path("top")).unwrap(), [path("middle"), path("base")]);
        std::fs::write(path("plain"), "nothing").unwrap();
        assert_eq!(below(&path("plain")).unwrap(), Vec::<PathBuf>::new());
    }

    #[test]
    fn what_leads_elsewhere_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let refused = |content: Vec<u8>| {
            std::fs::write(&path, content).unwrap();
            below(&path).unwrap_err()
        };
        for name in ["nbd:localhost:1", "json:{}", "https://x/y"] {
            assert!(refused(header(name, "raw", 0)).contains("no file of the host"), "{name}");
        }
        assert!(refused(header("x", "raw", DATA_ELSEWHERE)).contains("another file"));
        assert!(refused(header("x", "vmdk", 0)).contains("vmdk"));
        assert!(refused(header("image", "qcow2", 0)).contains("too many"));
        assert!(refused(header("missing", "qcow2", 0)).contains("No such file"));
        let mut cut = header("x", "", 0);
        cut.truncate(300);
        assert!(!refused(cut).is_empty());
    }
}
