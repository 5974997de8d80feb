//! What a measurement needs: our programs, the two QEMUs, and what guests are made of.

use std::path::PathBuf;

use sterna_lab::Packages;

/// Paths of everything that a scenario runs.
#[derive(Debug, Clone)]
pub struct Kit {
    /// The `sterna` command; its helper `sterna-attach` is beside it.
    pub sterna: PathBuf,
    /// `sterna-lab`, for its client.
    pub lab: PathBuf,
    /// Measures what tracking costs a process.
    pub tracking: PathBuf,
    /// QEMUs and the guests' kernel.
    pub packages: Packages,
    /// The guests' image.
    pub initramfs: PathBuf,
}
