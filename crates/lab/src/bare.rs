//! The guest without an operating system, for KVM: assembled here, since it is 32-bit code that no Rust target makes.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::place::{LabDir, replace};
use crate::{LabError, run};

const SOURCE: &str = include_str!("../../guest/bare/pattern.s");
const SCRIPT: &str = include_str!("../../guest/bare/pattern.ld");

/// Assembling a few hundred lines takes milliseconds.
const ASSEMBLE: Duration = Duration::from_secs(60);

/// Where the guest's memory begins: firmware and program are below.
const FIRST_MIB: u32 = 16;

/// What the guest is to be.
#[derive(Debug, Clone, Copy)]
pub struct Pattern {
    /// Processors, all of which count.
    pub vcpus: u8,
    /// Memory in which each of them counts.
    pub mib_per_vcpu: u32,
}

impl Pattern {
    /// RAM that QEMU must give it.
    #[must_use]
    pub fn memory_mib(self) -> u32 {
        FIRST_MIB + u32::from(self.vcpus) * self.mib_per_vcpu
    }

    /// Assembles it, and returns the file for `-kernel`. What it prints is told at the top of its source.
    pub fn build(self, dir: &LabDir) -> Result<PathBuf, LabError> {
        let _one_at_a_time = dir.lock()?;
        let (source, script) = (dir.join("bare/pattern.s"), dir.join("bare/pattern.ld"));
        replace(&source, SOURCE.as_bytes(), 0o644)?;
        replace(&script, SCRIPT.as_bytes(), 0o644)?;
        let program = dir.join(format!("bare/pattern-{}-{}", self.vcpus, self.mib_per_vcpu));
        let work = tempfile::tempdir().map_err(LabError::file("make a folder for", &program))?;
        let (object, linked) = (work.path().join("object"), work.path().join("linked"));
        let symbols = [format!("CPUS={}", self.vcpus), format!("MIB={}", self.mib_per_vcpu)];
        let mut assemble = Command::new("as");
        assemble.arg("--32").args(["--defsym", &symbols[0], "--defsym", &symbols[1], "-o"]);
        run::output(assemble.arg(&object).arg(&source), ASSEMBLE)?;
        let mut link = Command::new("ld");
        link.args(["-m", "elf_i386", "--build-id=none", "-z", "noexecstack", "-T"]).arg(&script);
        run::output(link.arg("-o").arg(&linked).arg(&object), ASSEMBLE)?;
        let bytes = std::fs::read(&linked).map_err(LabError::file("read", &linked))?;
        replace(&program, &bytes, 0o755)?;
        Ok(program)
    }
}
