//! What the tests, the demo and the benchmarks need beside the source: packages, guest programs, the guests' image.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use sterna_bench::Kit;
use sterna_lab::{LabDir, Packages, image, packages};

/// Everything in its place.
pub(crate) struct Ready {
    packages: Packages,
    image: PathBuf,
}

/// Fetches and builds what is missing; says what to install when that needs root and we are not.
pub(crate) fn ensure() -> anyhow::Result<Ready> {
    let dir = LabDir::open()?;
    let packages = packages::ensure(&dir)?;
    // The guest with every device has another one: it is fetched now and not in the middle of a test.
    packages::every_driver(&dir)?;
    let image = image::build(&dir, &packages)?;
    Ok(Ready { packages, image })
}

impl Ready {
    /// Tells a program where the two QEMUs are, as all tests expect it.
    pub(crate) fn tell<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env("STERNA_QEMU_72", &self.packages.qemu_72).env("STERNA_QEMU_10", &self.packages.qemu_10);
        command.env("STERNA_KERNEL", &self.packages.kernel).env("STERNA_INITRAMFS", &self.image)
    }

    /// Together with our programs in a directory: what a measurement runs.
    pub(crate) fn kit(self, programs: &Path) -> Kit {
        Kit {
            sterna: programs.join("sterna"),
            lab: programs.join("sterna-lab"),
            tracking: programs.join("examples/tracking"),
            packages: self.packages,
            initramfs: self.image,
        }
    }
}

impl fmt::Display for Ready {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "STERNA_QEMU_72={}", self.packages.qemu_72.display())?;
        writeln!(f, "STERNA_QEMU_10={}", self.packages.qemu_10.display())?;
        writeln!(f, "STERNA_KERNEL={}", self.packages.kernel.display())?;
        write!(f, "STERNA_INITRAMFS={}", self.image.display())
    }
}
