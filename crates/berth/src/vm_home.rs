//! The runtime directory of the VM of this process, and its control API.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use berth_api::types::{ConsoleKind, DiskInfo, Ending, NetInfo, VmDescription, VmInfo, VmState, VsockInfo};
use berth_api::{Claim, RuntimeError, VmDirectory, Vms, runtime::socket};
use berth_machine::MachineConfig;
use berth_machine::options::{self, NetBackend, NetOptions, VsockOptions};
use parking_lot::Mutex;

use crate::log;

/// Held here, so that every way out of the process can give it back. (A deadly one leaves it: the VM is then seen as
/// killed.)
static HOME: Mutex<Option<Claim>> = Mutex::new(None);

/// Takes the name `name`. A VM in the foreground also runs where there can be no directory for it.
///
/// # Errors
/// [`RuntimeError::Runs`]; any, if `must`.
pub fn enter(name: &str, must: bool) -> Result<Option<VmDirectory>, RuntimeError> {
    match Vms::open().and_then(|vms| vms.claim(name)) {
        Ok(claim) => {
            let directory = claim.directory().clone();
            *HOME.lock() = Some(claim);
            Ok(Some(directory))
        }
        Err(e) if must || matches!(e, RuntimeError::Runs { .. } | RuntimeError::BadName { .. }) => Err(e),
        Err(e) => {
            log::message(&format!("warning: `berth ps` and the like will not see this VM: {e}"));
            Ok(None)
        }
    }
}

/// Says what the VM is.
///
/// # Errors
/// [`RuntimeError`].
pub fn describe(description: &VmDescription) -> Result<(), RuntimeError> {
    HOME.lock().as_ref().map_or(Ok(()), |claim| claim.describe(description))
}

/// Keeps the directory after the process, for those who want to know how the VM ended.
pub fn keep(ending: &Ending) {
    if let Some(claim) = HOME.lock().as_mut()
        && let Err(e) = claim.keep(ending)
    {
        log::message(&format!("how the VM ended is not kept: {e}"));
    }
}

/// Gives the directory back: it is removed unless [`keep`] was called.
pub fn leave() {
    HOME.lock().take();
}

/// The socket for the agent in the guest, if the VM has none.
pub fn default_vsock(directory: &VmDirectory) -> Option<VsockOptions> {
    let path = directory.default_vsock();
    let vsock = path.to_str().and_then(|path| format!("path={path}").parse().ok());
    if vsock.is_none() {
        log::message(&format!(
            "warning: no `berth exec` in this VM: the path {} is not possible for sockets",
            path.display()
        ));
    }
    vsock
}

/// Listens for the control API.
///
/// # Errors
/// What the host says.
pub fn listen(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    socket::listen(path)
}

/// What is said of a VM that will be made of `config`.
pub fn description(
    config: &MachineConfig,
    image: Option<String>,
    detached: bool,
    api: PathBuf,
) -> VmDescription {
    let devices = &config.devices;
    let text = |path: &Path| absolute(path).display().to_string();
    let disk = |(index, disk): (usize, &options::DiskOptions)| DiskInfo {
        id: disk.id_at(index),
        path: text(&disk.path),
        read_only: disk.ro,
    };
    VmDescription {
        name: config.name.clone(),
        pid: std::process::id(),
        started_at: now(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        engine: config.engine.to_string(),
        vcpus: config.vcpus,
        memory_bytes: config.memory.size.0,
        reserve_bytes: config.memory.reserve.0,
        image,
        kernel: text(&config.kernel),
        cmdline: config.cmdline.clone(),
        console: match devices.console {
            options::ConsoleKind::Serial => ConsoleKind::Serial,
            options::ConsoleKind::Virtio => ConsoleKind::Virtio,
        },
        detached,
        disks: devices.disk.iter().enumerate().map(disk).collect(),
        nets: devices.net.iter().enumerate().map(net).collect(),
        vsock: devices.vsock.as_ref().map(|v| VsockInfo { cid: v.cid, path: absolute(&v.path) }),
        balloon: devices.balloon.is_some(),
        api_socket: absolute(&api),
    }
}

/// Other processes have other working directories.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn net((index, net): (usize, &NetOptions)) -> NetInfo {
    let (backend, forwards) = match net.backend() {
        Ok(NetBackend::User(forwards)) => ("user".to_owned(), forwards),
        Ok(NetBackend::Tap(name)) => (format!("tap {name}"), &[][..]),
        Ok(NetBackend::Bridge(name)) => (format!("bridge {name}"), &[][..]),
        Ok(NetBackend::Socket(path)) => (format!("socket {}", path.display()), &[][..]),
        // Such a machine is not made.
        Err(_) => (String::new(), &[][..]),
    };
    NetInfo { id: net.id_at(index), backend, forwards: forwards.iter().map(ToString::to_string).collect() }
}

/// Seconds since 1970.
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// What is known of a VM that cannot be asked, for people who look at it.
pub fn state_of_silent(directory: &VmDirectory) -> Option<VmInfo> {
    let mut info = directory.info()?;
    if info.state == VmState::Starting && directory.api_socket().exists() {
        info.state = VmState::Unresponsive;
    }
    Some(info)
}
