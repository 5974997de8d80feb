//! Whether the target's images are the source's, and whether their locks keep two QEMUs from writing.
//!
//! Two hosts that each have a file of the same name are the easiest way to lose a disk: the VM arrives, finds last
//! year's copy and writes into it. Names, sizes and file systems tell nothing. So the source locks a random byte of
//! each image, and the target must see that lock, and QEMU's, on the file that it would open: then both see one file,
//! and its locks pass between them. What the VM only reads may be a copy, if it is small enough to be compared.

mod chain;
mod lock;

use std::fs::File;
use std::path::{Path, PathBuf};

use super::cmdline::CommandLine;
use super::policy::{Host, HostMap, Presence, TargetPolicy};
use crate::types::{Code, Reason};
use lock::{Held, ImageFile};

/// The largest copy that is compared: UEFI firmware, which each host has for itself, has 4 to 16 MiB. An installation
/// medium has gigabytes, which nobody would wait for.
const COMPARED_BYTES_MAX: u64 = 64 << 20;

/// What the source shows of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageProof {
    /// The file, as it is called at the source.
    pub path: String,
    /// The byte of it that the source keeps locked.
    pub mark: u64,
    /// Whether the VM's QEMU has locked it.
    pub held: bool,
    /// A digest of the content, where the VM only reads it and it is small.
    pub digest: Vec<u8>,
}

/// The images of a VM, marked for as long as this is kept.
#[derive(Debug, Default)]
pub struct MarkedImages {
    /// One for each image, in the order of the command line; each with those below it.
    pub proofs: Vec<ImageProof>,
    _marks: Vec<File>,
}

/// An image that a command line names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Image {
    pub(super) path: String,
    /// Whether QEMU reads a header that names a file below it.
    pub(super) opens_below: bool,
    /// Whether it is asked to use no locks.
    pub(super) unlocked: bool,
}

/// Marks every image of a VM that runs as process `pid`, or says why that cannot be.
pub fn mark_images(line: &CommandLine, pid: i32) -> Result<MarkedImages, Vec<Reason>> {
    let (mut marked, mut reasons) = (MarkedImages::default(), unlocked_reasons(line));
    for image in line.images() {
        // Relative paths begin where QEMU stands.
        let path = Path::new(&format!("/proc/{pid}/cwd")).join(&image.path);
        let files = match files(&image, path) {
            Ok(files) => files,
            Err(why) => {
                reasons.push(Reason::new(Code::Image, format!("at the source: image {}: {why}", image.path)));
                continue;
            }
        };
        for (depth, file) in files.into_iter().enumerate() {
            match mark(&file, pid) {
                Ok((mut proof, kept)) => {
                    if depth == 0 {
                        proof.path.clone_from(&image.path);
                    }
                    marked.proofs.push(proof);
                    marked._marks.push(kept);
                }
                Err(why) => {
                    let text = format!("at the source: image {}: {why}", file.display());
                    reasons.push(Reason::new(Code::Image, text));
                }
            }
        }
    }
    if reasons.is_empty() { Ok(marked) } else { Err(reasons) }
}

fn mark(path: &Path, pid: i32) -> Result<(ImageProof, File), String> {
    let failed = |why: std::io::Error| why.to_string();
    let image = ImageFile::open(path)?;
    let held = image.held_by(pid).map_err(failed)?;
    if held == Held::Closed {
        return Err(
            "its QEMU does not have this file open, though its command line names it: the medium was \
                    changed, or another file has taken its place; put it back, or start the VM anew"
                .to_owned(),
        );
    }
    let compared = held == Held::Reads && image.bytes <= COMPARED_BYTES_MAX;
    let digest = if compared { image.digest().map_err(failed)? } else { Vec::new() };
    let (mark, kept) = image.mark().map_err(|why| {
        format!("its file system has no working locks ({why}), so that nothing would keep two QEMUs from writing it")
    })?;
    let path = path.to_string_lossy().into_owned();
    Ok((ImageProof { path, mark, held: held != Held::Unlocked, digest }, kept))
}

/// Every reason why the images that this host would open are not those that the source has marked. Files that are not
/// there, [`CommandLine::for_target`] tells.
pub fn image_reasons(
    line: &CommandLine,
    map: &HostMap,
    policy: &TargetPolicy,
    proofs: &[ImageProof],
) -> Vec<Reason> {
    let host = Host { map, policy };
    let mut reasons = unlocked_reasons(line);
    for (image, path, files) in chains(line, host) {
        let mut refuse = |text: String| reasons.push(Reason::new(Code::Image, format!("image {text}")));
        match files {
            Err(why) => refuse(format!("{path}: {why}")),
            Ok(files) => {
                let shown = proofs.iter().skip_while(|proof| proof.path != image.path).map(Some);
                let shown = shown.chain(std::iter::repeat(None));
                for ((depth, file), proof) in files.iter().enumerate().zip(shown) {
                    let allowed = if depth == 0 { Ok(()) } else { host.allows(file).map(drop) };
                    if let Err(why) = allowed.and_then(|()| compare(file, proof)) {
                        refuse(format!("{}: {why}", file.display()));
                    }
                }
            }
        }
    }
    reasons
}

/// Every reason why this host does not open what the images of a peer's command line lead to: QEMU follows their headers.
pub fn chain_reasons(line: &CommandLine, map: &HostMap, policy: &TargetPolicy) -> Vec<Reason> {
    let host = Host { map, policy };
    let refusal = |(_, path, files): (Image, String, Result<Vec<PathBuf>, String>)| {
        let below =
            files.and_then(|files| files.iter().skip(1).try_for_each(|file| host.allows(file).map(drop)));
        below.err().map(|why| Reason::new(Code::Image, format!("image {path}: {why}")))
    };
    chains(line, host).filter_map(refusal).collect()
}

/// The images of a peer's command line that are here, each with its path here and all that it leads to, itself first.
fn chains(
    line: &CommandLine,
    host: Host<'_>,
) -> impl Iterator<Item = (Image, String, Result<Vec<PathBuf>, String>)> {
    line.images().into_iter().filter_map(move |image| {
        let path = host.path(&image.path, Presence::Required).ok()?;
        let files = files(&image, path.clone().into());
        Some((image, path, files))
    })
}

fn compare(path: &Path, proof: Option<&ImageProof>) -> Result<(), String> {
    let failed = |why: std::io::Error| format!("its locks cannot be asked for: {why}");
    let proof =
        proof.ok_or("the source does not show that this is its file; the same version of Sterna on both")?;
    let image = ImageFile::open(path)?;
    if image.shows(proof.mark).map_err(failed)? {
        return match proof.held && !image.is_in_use().map_err(failed)? {
            true => {
                Err("the lock of the source's QEMU is not seen here; use a file system that passes locks on"
                    .into())
            }
            false => Ok(()),
        };
    }
    if !proof.digest.is_empty()
        && image.bytes <= COMPARED_BYTES_MAX
        && image.digest().map_err(failed)? == proof.digest
    {
        return Ok(());
    }
    Err(format!(
        "it is not the file {} of the source, or its file system passes no locks between hosts (the source's lock is \
         not seen); put the image on storage that both hosts reach, or let the target's map name the right file",
        proof.path
    ))
}

/// An image and all that it leads to.
fn files(image: &Image, path: PathBuf) -> Result<Vec<PathBuf>, String> {
    let below = if image.opens_below { chain::below(&path)? } else { Vec::new() };
    Ok(std::iter::once(path).chain(below).collect())
}

fn unlocked_reasons(line: &CommandLine) -> Vec<Reason> {
    let unlocked = line.images().into_iter().filter(|image| image.unlocked);
    let text = |image: Image| {
        format!(
            "image {} is used with file.locking=off, so that nothing would keep two QEMUs from writing it; start the VM \
             without that",
            image.path
        )
    };
    unlocked.map(|image| Reason::new(Code::Image, text(image))).collect()
}

/// The images in the settings of all `-drive` and `-blockdev`: keys with values, nested ones dotted.
pub(super) fn images_in(drives: &[Vec<(String, String)>], blockdevs: &[Vec<(String, String)>]) -> Vec<Image> {
    let of_drive = drives.iter().filter_map(|pairs| {
        let path =
            value(pairs, "file.filename").or_else(|| value(pairs, "file")).filter(|path| !path.is_empty())?;
        let format = value(pairs, "format").or_else(|| value(pairs, "driver"));
        let opens_below = format == Some("qcow2") && !names_below(pairs, "");
        Some(Image { path: path.to_owned(), opens_below, unlocked: is_unlocked(pairs) })
    });
    let of_blockdev = blockdevs.iter().flat_map(|pairs| {
        let names = pairs.iter().filter(|(key, _)| key.rsplit('.').next() == Some("filename"));
        names.map(|(key, path)| Image {
            path: path.clone(),
            opens_below: opens_below(pairs, key, blockdevs),
            unlocked: is_unlocked(pairs),
        })
    });
    of_drive.chain(of_blockdev).collect()
}

/// Whether the node over the file named at `key` is a qcow2 one that is not told what is below it.
fn opens_below(pairs: &[(String, String)], key: &str, all: &[Vec<(String, String)>]) -> bool {
    let node = key.strip_suffix("filename").unwrap_or_default();
    let is_qcow2 = |pairs: &[(String, String)], prefix: &str| {
        value(pairs, &format!("{prefix}driver")) == Some("qcow2") && !names_below(pairs, prefix)
    };
    match node.strip_suffix("file.") {
        Some(over) => is_qcow2(pairs, over),
        // A file on its own: whoever refers to it says what is in it.
        None => value(pairs, &format!("{node}node-name")).is_some_and(|name| {
            let refers = |other: &Vec<(String, String)>| {
                let files = other
                    .iter()
                    .filter(|(key, value)| value == name && key.rsplit('.').next() == Some("file"));
                files
                    .into_iter()
                    .any(|(key, _)| is_qcow2(other, key.strip_suffix("file").unwrap_or_default()))
            };
            all.iter().any(refers)
        }),
    }
}

fn value<'a>(pairs: &'a [(String, String)], key: &str) -> Option<&'a str> {
    pairs.iter().rev().find(|(found, _)| found == key).map(|(_, value)| value.as_str())
}

fn names_below(pairs: &[(String, String)], prefix: &str) -> bool {
    let backing = format!("{prefix}backing");
    pairs.iter().any(|(key, _)| *key == backing || key.starts_with(&format!("{backing}.")))
}

fn is_unlocked(pairs: &[(String, String)]) -> bool {
    let off = |value: &str| matches!(value, "off" | "no" | "false" | "n");
    pairs.iter().any(|(key, value)| key.rsplit('.').next() == Some("locking") && off(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a peer's image leads to is opened by QEMU unasked: it lies where this host allows it, or the image is refused.
    #[test]
    fn an_image_leads_nowhere_that_this_host_does_not_allow() {
        let folder = tempfile::tempdir().unwrap();
        let images = folder.path().join("images");
        std::fs::create_dir(&images).unwrap();
        for secret in [folder.path().join("secret"), images.join("base")] {
            std::fs::write(secret, "content").unwrap();
        }
        let policy = TargetPolicy { path_roots: vec![images.clone()], ..TargetPolicy::default() };
        let top = images.join("top.qcow2");
        let line = ["qemu", "-drive", &format!("file={},format=qcow2,if=virtio", top.display())];
        let line = CommandLine::parse(line.map(str::to_owned).to_vec()).unwrap();
        let reasons = |base: &str| {
            std::fs::write(&top, chain::tests::header(base, "raw", 0)).unwrap();
            chain_reasons(&line, &HostMap::default(), &policy)
        };
        assert_eq!(reasons("base"), []);
        for outside in ["../secret", "/etc/shadow", "nbd:localhost:1"] {
            let found = reasons(outside);
            assert!(found.len() == 1 && found[0].code == Code::Image, "{outside}: {found:?}");
        }
    }
}
