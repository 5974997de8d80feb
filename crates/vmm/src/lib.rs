//! What Sterna needs of a virtual machine monitor, and QEMU as the one that it knows.
//!
//! The rest of Sterna speaks to [`Vmm`] alone: pause and resume, device state out and in, where the RAM blocks
//! are, and what both ends must agree on. [`qemu::Qemu`] does this to an unmodified QEMU over QMP, and nothing
//! outside [`qemu`] knows QMP; [`fake::FakeVmm`] does it in memory, with failures that a test scripts.
//!
//! All of it blocks, and every wait has a deadline: a caller that needs to go on meanwhile uses a thread.
//!
//! The order of a move, as calls:
//!
//! ```text
//! source                                   target
//! source_reasons()  must be empty          prepare_load()      reads a pipe that nothing is in yet
//! prepare_save()    while it runs          layout()
//! pause_and_save()                         ...RAM arrives...
//!              .. save_finish()  ------->  load(state)         loaded, paused, disks still the source's
//! (undo: restore())                        resume()            the instant at which the owner changes
//!                                          or take_disks()     the same for a VM that was paused before
//! quit()                                   announce()
//! ```
#![forbid(unsafe_code)]

pub mod fake;
mod process;
pub mod qemu;
mod types;

use std::os::fd::BorrowedFd;
use std::time::Duration;

pub use process::ProcessId;
pub use sterna_memory::{Process, ProcessError};
pub use types::{
    Block, Code, Fingerprint, Glance, Layout, LentFd, Reason, RunState, SaveTicket, Shape, VmmError,
    difference,
};

/// A virtual machine in a process of its own, as much as a migration must know of it.
///
/// Nothing here decides who owns the VM: the hand-off calls [`pause`](Vmm::pause) and [`resume`](Vmm::resume)
/// at the moments that it has made safe.
pub trait Vmm: Send {
    /// The process that holds the VM's memory, for reading and tracking that memory.
    fn process_id(&self) -> ProcessId;

    /// Asks what the VM does now.
    fn status(&mut self) -> Result<RunState, VmmError>;

    /// Every reason why this VM cannot move, found without touching it. Empty means that it can.
    ///
    /// Ask in the pre-check and again just before the stop: a device can be added at any time.
    fn source_reasons(&mut self) -> Result<Vec<Reason>, VmmError>;

    /// Where the RAM blocks are. Addresses never change within a process, blocks and lengths may.
    fn layout(&mut self) -> Result<Layout, VmmError>;

    /// Everything both ends must have in common, as lines of text that [`difference`] compares.
    fn fingerprint(&mut self) -> Result<Fingerprint, VmmError>;

    /// Tells quickly whether the VM is still made of what it was when its [`fingerprint`](Vmm::fingerprint) was taken: take one then,
    /// compare it with one just before the stop, and with a glance in it.
    ///
    /// QEMU does not know that we migrate, and lets everybody plug things in and out.
    fn shape(&mut self) -> Result<Shape, VmmError>;

    /// Tells [`Shape::glance`], quickly enough for the downtime.
    ///
    /// # Errors
    /// [`VmmError::WrongState`] after [`pause_and_save`](Vmm::pause_and_save) of a VM that is not paused: it stopped by itself.
    fn glance(&mut self) -> Result<Glance, VmmError>;

    /// Gives the VMM a descriptor to keep, and tells its number in the VMM's process.
    fn lend_fd(&mut self, fd: BorrowedFd<'_>) -> Result<LentFd, VmmError>;

    /// Closes the VMM's copy of a lent descriptor.
    fn take_back_fd(&mut self, lent: LentFd) -> Result<(), VmmError>;

    /// Makes ready for a save while the VM still runs, so that nothing of it falls into the downtime.
    fn prepare_save(&mut self) -> Result<(), VmmError>;

    /// Whether hardware reads disks right into the VM's memory, past what tracks writes: see [`drain`](Vmm::drain).
    fn reads_directly(&mut self) -> Result<bool, VmmError>;

    /// Stops the VM's processors and waits until its devices have no I/O in flight. Tells in what state it was: `Running`,
    /// or one that [`stands`](RunState::stands), which is left as it is.
    ///
    /// # Errors
    /// [`VmmError::WrongState`] when it is in another state, or comes into another while it is being stopped: a guest can
    /// panic or switch itself off at any moment. Nothing was done then.
    fn pause(&mut self) -> Result<RunState, VmmError>;

    /// Tells what the VM does, and makes ready for [`pause_and_save`](Vmm::pause_and_save), so that little of it falls into the downtime.
    fn ready_to_pause(&mut self) -> Result<RunState, VmmError> {
        self.status()
    }

    /// [`pause`](Vmm::pause) and [`save_begin`](Vmm::save_begin) in one go. That the VM became paused, and did not stop for a reason of its
    /// own, may be known only at [`glance`](Vmm::glance).
    fn pause_and_save(&mut self) -> Result<(RunState, SaveTicket), VmmError> {
        Ok((self.pause()?, self.save_begin()?))
    }

    /// Waits until no disk I/O is in flight that was when this was called. A VM that runs stands still for that long.
    fn drain(&mut self) -> Result<(), VmmError>;

    /// Undoes [`pause`](Vmm::pause) and a save: a VM that ran before runs again, one that stood has its disks again.
    fn restore(&mut self) -> Result<(), VmmError>;

    /// Gives a VM that stands still its disks (the locks on its images), at the source after a save as at a loaded target.
    fn take_disks(&mut self) -> Result<(), VmmError>;

    /// Lets the VM run. At a loaded target this is the instant at which it takes the disks.
    ///
    /// Harmless when it runs; refused at a target that waits for its state, for the VM would then start by
    /// itself as soon as the state came.
    fn resume(&mut self) -> Result<(), VmmError>;

    /// Starts to save the device state of a paused VM, and does not wait.
    ///
    /// A second save needs a [`restore`](Vmm::restore) in between: QEMU 7.2 aborts without, and takes the VM along.
    fn save_begin(&mut self) -> Result<SaveTicket, VmmError>;

    /// Waits for the save and returns the device state, as [`load`](Vmm::load) takes it.
    fn save_finish(&mut self, ticket: SaveTicket) -> Result<Vec<u8>, VmmError>;

    /// Makes a waiting target ready, so that [`load`](Vmm::load) has nothing to do but to load.
    fn prepare_load(&mut self) -> Result<(), VmmError>;

    /// Loads device state into a waiting target, which is then paused. RAM must be complete before.
    fn load(&mut self, state: &[u8]) -> Result<(), VmmError>;

    /// Tells the network where the VM now is.
    fn announce(&mut self) -> Result<(), VmmError>;

    /// Ends the VM's process, by force if it must be, and waits until it is gone.
    fn quit(&mut self, within: Duration) -> Result<(), VmmError>;
}
