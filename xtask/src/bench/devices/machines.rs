//! The commands: VMs of both sides, and what they talk to.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use berth_tests_boot::Namespace;

use super::Side;

/// fio and its libraries are in the initramfs.
const MEMORY: &str = "768M";
/// The tap device in its namespace, and the host's address there.
const TAP: &str = "berth-tap";
pub const TAP_ADDRESS: &str = "10.77.0.1";
/// Largest packet without Ethernet header of user networking, as Berth has it.
const USER_MTU: &str = "65520";

/// What VMs are made of.
pub struct Machines {
    pub qemu: PathBuf,
    pub berth: PathBuf,
    pub kernel: PathBuf,
    pub initrd: PathBuf,
}

/// The device that is measured.
pub enum Attached<'a> {
    Disk {
        path: &'a Path,
        cache: &'a str,
    },
    /// With the socket of a passt for who does not start it by himself.
    User(Option<&'a Path>),
    Tap,
}

impl Machines {
    /// A VM with one vCPU that runs the shell command `orders` and powers off.
    pub fn command(
        &self,
        side: Side,
        attached: &Attached<'_>,
        namespace: Option<&Namespace>,
        orders: &str,
    ) -> Command {
        let program = match side {
            Side::Qemu => &self.qemu,
            Side::Berth => &self.berth,
        };
        let mut command = match namespace {
            Some(namespace) => namespace.command(program),
            None => Command::new(program),
        };
        let dashes = match side {
            Side::Qemu => {
                command.args(["-M", "pc", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1"]);
                command.args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]);
                command.args(["-no-reboot", "-m", MEMORY]);
                command.args(qemu_device(attached));
                "-"
            }
            Side::Berth => {
                command.args(["run", "--engine", "soft", "--no-reboot", "--memory", MEMORY, "--cpus", "1"]);
                command.args(berth_device(attached));
                "--"
            }
        };
        command.arg(format!("{dashes}kernel")).arg(&self.kernel);
        command.arg(format!("{dashes}initrd")).arg(&self.initrd);
        // On a busy host the kernel's check of QEMU's timer fails now and then, and that is a panic.
        let parameters = berth_guest_image::KERNEL_PARAMETERS;
        let parameters = format!("{parameters} panic=-1 no_timer_check \"berth.run={orders}\"");
        command.arg(format!("{dashes}append")).arg(parameters);
        command
    }
}

fn berth_device(attached: &Attached<'_>) -> Vec<String> {
    let option = match attached {
        Attached::Disk { path, cache } => {
            return vec!["--disk".into(), format!("{},cache={cache}", path.display())];
        }
        Attached::User(_) => "user".to_owned(),
        Attached::Tap => format!("tap={TAP}"),
    };
    vec!["--net".into(), option]
}

fn qemu_device(attached: &Attached<'_>) -> Vec<String> {
    let (backend, device) = match attached {
        Attached::Disk { path, cache } => {
            let path = path.display();
            let drive = format!("file={path},format=raw,if=none,id=d,cache={cache},aio=io_uring");
            return ["-drive", &drive, "-device", "virtio-blk-pci,drive=d"].map(str::to_owned).to_vec();
        }
        Attached::User(socket) => {
            let socket = socket.map_or_else(String::new, |s| s.display().to_string());
            (
                format!("stream,id=n,server=off,addr.type=unix,addr.path={socket}"),
                format!("virtio-net-pci,netdev=n,host_mtu={USER_MTU}"),
            )
        }
        Attached::Tap => (
            format!("tap,id=n,ifname={TAP},script=no,downscript=no,vhost=off"),
            "virtio-net-pci,netdev=n".to_owned(),
        ),
    };
    ["-netdev", &backend, "-device", &device].map(str::to_owned).to_vec()
}

/// A namespace with the tap device; `None` if this user may not make one.
pub fn tap_namespace() -> Result<Option<Namespace>, String> {
    let Some(namespace) = Namespace::make() else { return Ok(None) };
    namespace.ip(&format!(
        "link set lo up
         tuntap add dev {TAP} mode tap
         addr add {TAP_ADDRESS}/24 dev {TAP}
         link set {TAP} up"
    ))?;
    Ok(Some(namespace))
}

/// A program that ends when this is dropped.
pub struct Helper {
    child: Child,
    pub port: u16,
}

impl Drop for Helper {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An iperf3 that listens, in `namespace` or on this host.
pub fn iperf(namespace: Option<&Namespace>) -> Result<Helper, String> {
    // A port that is free now; nobody else is likely to take it.
    let port =
        TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).map_err(|e| e.to_string())?.port();
    let mut command = match namespace {
        Some(namespace) => namespace.command("iperf3"),
        None => Command::new("iperf3"),
    };
    command.args(["--server", "--forceflush", "--port", &port.to_string()]);
    let mut child = command.stdout(Stdio::piped()).spawn().map_err(|e| format!("iperf3: {e}"))?;
    let output = child.stdout.take();
    let helper = Helper { child, port };
    let mut lines = BufReader::new(output.ok_or("iperf3 has no output")?).lines().map_while(Result::ok);
    if !lines.any(|line| line.contains("listening")) {
        return Err("iperf3 does not listen".to_owned());
    }
    // Read on, or it would wait for that some day.
    std::thread::spawn(move || lines.for_each(drop));
    Ok(helper)
}

/// A passt with a socket for QEMU.
pub struct Passt {
    _helper: Helper,
    pub socket: PathBuf,
    _directory: tempfile::TempDir,
}

/// Starts one, as Berth does it.
pub fn passt() -> Result<Passt, String> {
    let directory = tempfile::tempdir().map_err(|e| e.to_string())?;
    // Started by root it goes on as nobody, who makes the socket.
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).map_err(|e| e.to_string())?;
    let socket = directory.path().join("passt");
    let mut command = Command::new("passt");
    command.args(["--foreground", "--quiet", "--mtu", USER_MTU, "--socket"]).arg(&socket);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let child = command.spawn().map_err(|e| format!("passt: {e}"))?;
    let helper = Helper { child, port: 0 };
    let end = Instant::now() + Duration::from_secs(10);
    while !socket.exists() {
        if Instant::now() > end {
            return Err("passt makes no socket".to_owned());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(Passt { _helper: helper, socket, _directory: directory })
}
