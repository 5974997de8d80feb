//! Kernel modules with what they depend on, in the order in which they can be loaded.
//!
//! The package has no `modules.dep` (that is made when it is installed); each module says itself what it depends on, in
//! its section `.modinfo`: strings `depends=a,b` that end with a zero byte.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::LabError;

/// Deeper chains than this are circles.
const DEPTH_MAX: usize = 16;

/// A module to be loaded.
#[derive(Debug)]
pub(super) struct Module {
    pub(super) name: String,
    pub(super) content: Vec<u8>,
}

/// The wanted modules, each after those that it depends on.
pub(super) fn in_order(tree: &Path, wanted: &[&str]) -> Result<Vec<Module>, LabError> {
    let mut files = BTreeMap::new();
    collect(&tree.join("kernel"), &mut files)?;
    let mut order = Vec::new();
    wanted.iter().try_for_each(|name| add(name, &files, &mut order, DEPTH_MAX))?;
    Ok(order)
}

fn add(
    name: &str,
    files: &BTreeMap<String, PathBuf>,
    order: &mut Vec<Module>,
    depth: usize,
) -> Result<(), LabError> {
    let name = name.replace('-', "_");
    if order.iter().any(|m| m.name == name) {
        return Ok(());
    }
    let (Some(path), Some(depth)) = (files.get(&name), depth.checked_sub(1)) else {
        return Err(LabError::unexpected("the kernel's package has no such module", name));
    };
    let content = std::fs::read(path).map_err(LabError::file("read", path))?;
    depends(&content).iter().try_for_each(|d| add(d, files, order, depth))?;
    order.push(Module { name, content });
    Ok(())
}

fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|w| w == KEY) else { return Vec::new() };
    let value = module[at + KEY.len()..].split(|b| *b == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(value).into_owned();
    names.split(',').filter(|n| !n.is_empty()).map(str::to_owned).collect()
}

fn collect(dir: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<(), LabError> {
    for entry in std::fs::read_dir(dir).map_err(LabError::file("list", dir))?.flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            collect(&path, files)?;
        } else if let Some(name) = path.file_name().and_then(|n| n.to_str()?.strip_suffix(".ko")) {
            files.insert(name.replace('-', "_"), path.clone());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(modules: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("kernel")).unwrap();
        for (name, depends) in modules {
            let content = format!("\x7fELF\0license=GPL\0depends={depends}\0name={name}\0");
            std::fs::write(dir.path().join(format!("kernel/{name}.ko")), content).unwrap();
        }
        dir
    }

    #[test]
    fn what_is_needed_comes_first_and_once() {
        let tree = tree(&[
            ("net", "fail-over,ring"),
            ("fail-over", ""),
            ("ring", "base"),
            ("base", ""),
            ("other", ""),
        ]);
        let names: Vec<_> =
            in_order(tree.path(), &["net", "ring"]).unwrap().into_iter().map(|m| m.name).collect();
        assert_eq!(names, ["fail_over", "base", "ring", "net"]);
    }

    #[test]
    fn a_missing_module_and_a_circle_are_errors() {
        let tree = tree(&[("a", "b"), ("b", "a"), ("c", "gone")]);
        in_order(tree.path(), &["a"]).unwrap_err();
        assert!(in_order(tree.path(), &["c"]).unwrap_err().to_string().contains("gone"));
    }
}
