//! `/dev/kvm`: opening it, creating a VM, and why that may fail (Documentation/virt/kvm/api.rst, section 4.1 on).

use std::ffi::CString;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use kvm_ioctls::{Cap, Kvm, VmFd};

/// The version of the interface that every kernel since 2.6.22 has; others are to be refused.
const API_VERSION: i32 = 12;
/// KVM_CREATE_VM gives up when a signal comes in between; so often it is tried again.
const ATTEMPTS: u32 = 100;

/// Why there is no VM. One line for people, with what to do where something can be done.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The device does not exist.
    #[error("there is no /dev/kvm (is the module kvm_intel or kvm_amd loaded?)")]
    NoDevice,
    /// This user may not open it.
    #[error("permission denied on /dev/kvm: add yourself to the group kvm")]
    Permission,
    /// Opening fails otherwise.
    #[error("/dev/kvm does not open: {0}")]
    Open(io::Error),
    /// It opens, and is something else.
    #[error("/dev/kvm does not answer as KVM")]
    NotKvm,
    /// An interface from before Linux 2.6.22, or from the future.
    #[error("/dev/kvm has version {0} of the interface, not 12")]
    Version(i32),
    /// The CPU's virtualization is in other hands.
    #[error("/dev/kvm is busy: another hypervisor holds it")]
    Busy,
    /// No VM, for another reason.
    #[error("/dev/kvm opens but creates no VM: {0}")]
    CreateVm(io::Error),
    /// The kernel is too old.
    #[error("the kernel's KVM has no {0}: Linux 4.13 or later is needed")]
    Lacks(&'static str),
}

/// Extensions without which the engine does not work, and the name for people.
const NEEDED: [(Cap, &str); 9] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
];

/// Of these one must be there.
pub(crate) const NO_CHIPS: &str = "KVM_CAP_IRQCHIP and no KVM_CAP_SPLIT_IRQCHIP";

/// The device, opened, of the right version.
#[derive(Debug)]
pub struct Device(Kvm);

impl Device {
    /// Opens `path`, which is `/dev/kvm` except in tests.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn open(path: &Path) -> Result<Self, Refusal> {
        let c_path = CString::new(path.as_os_str().as_bytes()).map_err(|_| Refusal::NoDevice)?;
        let kvm = Kvm::new_with_path(c_path).map_err(|e| match io::Error::from(e) {
            e if e.kind() == ErrorKind::NotFound => Refusal::NoDevice,
            e if e.kind() == ErrorKind::PermissionDenied => Refusal::Permission,
            e => Refusal::Open(e),
        })?;
        match kvm.get_api_version() {
            API_VERSION => Ok(Self(kvm)),
            version if version < 0 => Err(Refusal::NotKvm),
            version => Err(Refusal::Version(version)),
        }
    }

    /// Version of the interface.
    pub fn api_version(&self) -> i32 {
        self.0.get_api_version()
    }

    /// Creates a VM, which lives as long as its descriptor.
    ///
    /// # Errors
    /// [`Refusal::Busy`] and [`Refusal::CreateVm`].
    pub fn create_vm(&self) -> Result<VmFd, Refusal> {
        let mut attempt = 1;
        loop {
            let error = match self.0.create_vm() {
                Ok(vm) => return Ok(vm),
                Err(error) => io::Error::from(error),
            };
            match error.raw_os_error() {
                Some(libc::EINTR) if attempt < ATTEMPTS => attempt += 1,
                Some(libc::EBUSY) => return Err(Refusal::Busy),
                _ => return Err(Refusal::CreateVm(error)),
            }
        }
    }

    /// Refuses kernels that lack what the engine needs.
    ///
    /// # Errors
    /// [`Refusal::Lacks`] names the first extension that is missing.
    pub fn check(&self) -> Result<(), Refusal> {
        let has = |cap| self.0.check_extension(cap);
        match NEEDED.iter().find(|(cap, _)| !has(*cap)) {
            Some((_, name)) => Err(Refusal::Lacks(name)),
            None if !has(Cap::Irqchip) && !has(Cap::SplitIrqchip) => Err(Refusal::Lacks(NO_CHIPS)),
            None => Ok(()),
        }
    }

    /// The device itself, for the rest of the engine.
    pub(crate) fn kvm(&self) -> &Kvm {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_says_why() {
        let absent = Device::open(Path::new("/nonexistent/kvm")).unwrap_err();
        assert!(absent.to_string().contains("there is no /dev/kvm"), "{absent}");
        let other = Device::open(Path::new("/dev/null")).unwrap_err();
        assert!(matches!(other, Refusal::NotKvm), "{other}");
        let odd = Device::open(Path::new("/\0")).unwrap_err();
        assert!(matches!(odd, Refusal::NoDevice), "{odd}");
        assert!(Refusal::Permission.to_string().contains("group kvm"));
        assert!(Refusal::Busy.to_string().contains("another hypervisor"));
    }
}
