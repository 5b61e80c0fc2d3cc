//! `/dev/kvm`: whether it can be used, and what is behind it (the kernel's `Documentation/virt/kvm/api.rst`).

use std::fs::OpenOptions;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use serde::Serialize;

/// `KVM_GET_API_VERSION`: `_IO(0xAE, 0x00)`.
const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;
/// `KVM_CREATE_VM`: `_IO(0xAE, 0x01)`.
const KVM_CREATE_VM: libc::c_ulong = 0xae01;

/// What `/dev/kvm` is good for.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Kvm {
    /// The device exists.
    pub present: bool,
    /// It can be opened for reading and writing.
    pub opens: bool,
    /// Version of its interface; 12 since 2007.
    pub api_version: Option<i32>,
    /// A VM could be created, as a trial.
    pub creates_vm: bool,
    /// What executes the guests.
    pub kind: Option<KvmKind>,
    /// What failed, for people.
    pub problem: Option<String>,
}

/// What executes the guests of a `/dev/kvm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum KvmKind {
    /// The CPU's own virtualization.
    Hardware,
    /// No vmx or svm: a KVM of a nested host that only isolates guests by page tables, and emulates the kernels
    /// of guests that are not prepared for it.
    PageTables,
}

impl Kvm {
    /// Tries `dev/kvm` below `root`; `hardware` is whether the CPU shows vmx or svm.
    pub fn probe(root: &Path, hardware: bool) -> Self {
        let path = root.join("dev/kvm");
        let mut kvm = Self { present: path.exists(), ..Self::default() };
        if !kvm.present {
            kvm.problem = Some("there is no /dev/kvm".to_owned());
            return kvm;
        }
        let device = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(device) => device,
            Err(e) => {
                kvm.problem = Some(open_problem(&e));
                return kvm;
            }
        };
        kvm.opens = true;
        match number_of(device.as_raw_fd(), KVM_GET_API_VERSION) {
            Ok(version) => kvm.api_version = Some(version),
            Err(e) => {
                kvm.problem = Some(format!("/dev/kvm does not answer as KVM: {e}"));
                return kvm;
            }
        }
        match number_of(device.as_raw_fd(), KVM_CREATE_VM) {
            Ok(fd) => {
                // SAFETY: KVM_CREATE_VM returned a new descriptor that nobody else owns.
                drop(unsafe { OwnedFd::from_raw_fd(fd) });
                kvm.creates_vm = true;
                kvm.kind = Some(if hardware { KvmKind::Hardware } else { KvmKind::PageTables });
            }
            Err(e) => kvm.problem = Some(format!("/dev/kvm opens but creates no VM: {e}")),
        }
        kvm
    }
}

fn open_problem(e: &io::Error) -> String {
    match e.kind() {
        ErrorKind::PermissionDenied => {
            "no permission to open /dev/kvm (on most hosts: become a member of the group kvm)".to_owned()
        }
        _ => format!("/dev/kvm does not open: {e}"),
    }
}

/// An ioctl that takes 0 and returns a number.
fn number_of(fd: libc::c_int, request: libc::c_ulong) -> io::Result<libc::c_int> {
    // SAFETY: both requests take an integer, no pointer; 0 is the default type of VM.
    let result = unsafe { libc::ioctl(fd, request, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_permission_says_what_to_do() {
        assert!(open_problem(&ErrorKind::PermissionDenied.into()).contains("group kvm"));
    }

    #[test]
    fn the_hosts_own_device_is_described_without_contradiction() {
        let kvm = Kvm::probe(Path::new("/"), false);
        assert_eq!(kvm.creates_vm, kvm.problem.is_none());
        assert!(kvm.opens || kvm.api_version.is_none());
        assert_eq!(kvm.kind, kvm.creates_vm.then_some(KvmKind::PageTables));
    }
}
