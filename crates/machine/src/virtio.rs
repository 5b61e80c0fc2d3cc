//! The virtio devices of a machine: made from their options, and put on PCI from device 1 on.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use berth_devices::irq::Interrupts;
use berth_devices::irq::IrqError;
use berth_devices::pci::{PciError, PciRoot, intx_gsi};
use berth_devices::thread_name;
use berth_devices::virtio::balloon::{Balloon, BalloonFeatures};
use berth_devices::virtio::block::{Block, BlockCounters, BlockError, BlockOptions};
use berth_devices::virtio::console::{Console, Output};
use berth_devices::virtio::net::{Cable, Net, NetCounters, Stream, StreamError, Tap, TapError};
use berth_devices::virtio::rng::Rng;
use berth_devices::virtio::vsock::Vsock;
use berth_devices::virtio::{Dma, PciWiring, VirtioDevice, VirtioPci, VirtioPciError};
use berth_disk::{CacheMode, DiskError, OpenOptions};
use berth_engine::Engine;
use berth_memory::GuestMemory;

use crate::config::MachineConfig;
use crate::options::{
    ConsoleKind, DiskOptions, Forward, MacAddress, NetBackend, NetOptions, OptionError, Protocol,
};

/// PCI device numbers are 0 to 31, and the host bridge has 0.
const MAX_DEVICES: u8 = 31;
/// Most pairs of queues of a network interface: more threads than that only wait for each other.
const MAX_PAIRS: u16 = 8;

/// Why the virtio devices cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum VirtioError {
    /// Options that make no sense together.
    #[error(transparent)]
    Options(#[from] OptionError),
    /// A disk's image.
    #[error("disk: {0}")]
    Disk(#[from] DiskError),
    /// A tap device.
    #[error("net: {0}")]
    Tap(#[from] TapError),
    /// User networking.
    #[error("net: {0}")]
    Stream(#[from] StreamError),
    /// The Unix socket of host programs.
    #[error("vsock: cannot listen at {path}: {source}")]
    Vsock {
        /// The socket.
        path: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The host refuses something.
    #[error("the host refuses what the {device} needs: {source}")]
    Host {
        /// The device.
        device: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// PCI has no more places.
    #[error("a VM has at most {MAX_DEVICES} virtio devices")]
    TooMany,
    /// The transport.
    #[error(transparent)]
    Transport(#[from] VirtioPciError),
    /// The place on PCI.
    #[error("internal error: {0}")]
    Pci(#[from] PciError),
    /// The pin.
    #[error("internal error: {0}")]
    Irq(#[from] IrqError),
}

/// Why a disk keeps its size.
#[derive(Debug, thiserror::Error)]
pub enum DiskResizeError {
    /// No disk has this id.
    #[error("there is no disk {id:?}: {disks}")]
    NoDisk {
        /// What was asked for.
        id: String,
        /// The disks that there are, for people.
        disks: String,
    },
    /// The image.
    #[error("disk {id:?} keeps its size: {source}")]
    Image {
        /// The disk.
        id: String,
        /// What is wrong.
        #[source]
        source: io::Error,
    },
}

/// All virtio devices of a machine.
pub struct VirtioDevices {
    functions: Vec<Arc<VirtioPci>>,
    disks: Vec<(String, Arc<Block>)>,
    nets: Vec<(String, Arc<Net>)>,
    console: Option<Arc<Console>>,
    balloon: Option<Arc<Balloon>>,
    vsock: Option<Arc<Vsock>>,
    dma: Dma,
}

impl VirtioDevices {
    /// Makes the devices of `config` and puts them on `pci`. A virtio console prints to `output`.
    ///
    /// # Errors
    /// [`VirtioError`].
    pub fn new(
        config: &MachineConfig,
        memory: &GuestMemory,
        interrupts: &Interrupts,
        pci: &PciRoot,
        output: &Output,
    ) -> Result<Self, VirtioError> {
        let options = &config.devices;
        options.check()?;
        let mut made = Self {
            functions: Vec::new(),
            disks: Vec::new(),
            nets: Vec::new(),
            console: None,
            balloon: None,
            vsock: None,
            dma: Dma::new(memory.clone()),
        };
        let wiring = Wiring { interrupts, pci };
        let thread = |role: &str| thread_name(&config.name, role);
        for (index, disk) in options.disk.iter().enumerate() {
            let id = disk.id_at(index);
            let block = Arc::new(open_disk(disk, index, config)?);
            made.disks.push((id.clone(), block.clone()));
            made.add(block, &id, &wiring)?;
        }
        for (index, net) in options.net.iter().enumerate() {
            let id = net.id_at(index);
            let cable = connect(net, config.vcpus)?;
            let mac = net.mac.unwrap_or_else(|| MacAddress::of_vm(&config.name, index));
            let names = (0..=cable.pairs()).map(|pair| thread(&format!("net{index}.{pair}"))).collect();
            let device = Arc::new(Net::new(mac.0, cable, names));
            made.nets.push((id.clone(), device.clone()));
            made.add(device, &id, &wiring)?;
        }
        if let Some(vsock) = &options.vsock {
            let device = Vsock::new(vsock.cid, &vsock.path, thread("vsock"))
                .map_err(|source| VirtioError::Vsock { path: vsock.path.display().to_string(), source })?;
            let device = Arc::new(device);
            made.vsock = Some(device.clone());
            made.add(device, "vsock", &wiring)?;
        }
        if options.console == ConsoleKind::Virtio {
            let console = Console::new(output.clone(), thread("hvc0"))
                .map_err(|source| VirtioError::Host { device: "console", source })?;
            let console = Arc::new(console);
            made.console = Some(console.clone());
            made.add(console, "console", &wiring)?;
        }
        if let Some(b) = &options.balloon {
            let features = BalloonFeatures {
                deflate_on_oom: b.deflate_on_oom,
                reporting: b.reporting,
                hinting: b.hinting,
            };
            let balloon = Arc::new(Balloon::new(b.size.0.min(memory.size()), features, thread("balloon")));
            made.balloon = Some(balloon.clone());
            made.add(balloon, "balloon", &wiring)?;
        }
        if options.rng {
            made.add(Arc::new(Rng::new(thread("rng"))), "rng", &wiring)?;
        }
        Ok(made)
    }

    fn add(
        &mut self,
        device: Arc<dyn VirtioDevice>,
        name: &str,
        wiring: &Wiring<'_>,
    ) -> Result<(), VirtioError> {
        let place = u8::try_from(self.functions.len()).unwrap_or(u8::MAX).saturating_add(1);
        if place > MAX_DEVICES {
            return Err(VirtioError::TooMany);
        }
        let line = wiring.interrupts.line(intx_gsi(place, 0))?;
        let pci = PciWiring { dma: self.dma.clone(), msi: Arc::new(wiring.interrupts.clone()), line };
        let function = Arc::new(VirtioPci::new(device, name, pci)?);
        wiring.pci.add(place, 0, function.clone())?;
        self.functions.push(function);
        Ok(())
    }

    /// Tells `engine` of the devices' writes to guest memory.
    pub fn connect_engine(&self, engine: Arc<dyn Engine>) {
        self.dma.connect(engine);
    }

    /// Stops the devices' threads, and writes out what disks still keep in memory.
    pub fn pause(&self) {
        for function in &self.functions {
            function.pause();
        }
    }

    /// Goes on after [`Self::pause`].
    pub fn resume(&self) {
        for function in &self.functions {
            function.resume();
        }
    }

    /// All devices as after power-up.
    pub fn reset(&self) {
        for function in &self.functions {
            function.reset();
        }
    }

    /// The virtio console, if the terminal is connected to one.
    pub fn console(&self) -> Option<&Console> {
        self.console.as_deref()
    }

    /// The balloon, if there is one.
    pub fn balloon(&self) -> Option<&Balloon> {
        self.balloon.as_deref()
    }

    /// Descriptors that become readable when a program of the host wants something of the guest: those of vsock and of
    /// user networking. Tap devices have packets that nobody asked for. Call it while the devices
    /// pause.
    ///
    /// # Errors
    /// What the host says.
    pub fn host_sockets(&self) -> io::Result<Vec<OwnedFd>> {
        let mut sockets = self.vsock.as_ref().map_or(Ok(Vec::new()), |vsock| vsock.host_sockets())?;
        for (_, net) in &self.nets {
            sockets.extend(net.host_socket()?);
        }
        Ok(sockets)
    }

    /// Each disk's id and what it has done.
    pub fn disk_counters(&self) -> Vec<(String, BlockCounters)> {
        self.disks.iter().map(|(id, disk)| (id.clone(), disk.counters())).collect()
    }

    /// Each disk's id and size in bytes.
    pub fn disk_sizes(&self) -> Vec<(String, u64)> {
        self.disks.iter().map(|(id, disk)| (id.clone(), disk.size())).collect()
    }

    /// Each network interface's id and what it has carried.
    pub fn net_counters(&self) -> Vec<(String, NetCounters)> {
        self.nets.iter().map(|(id, net)| (id.clone(), net.counters())).collect()
    }

    /// Calls `sink` with a disk's id on each request that the host cannot do. Only the first call counts.
    pub fn on_disk_error(&self, sink: impl Fn(&str, BlockError) + Send + Sync + 'static) {
        let sink = Arc::new(sink);
        for (id, disk) in &self.disks {
            let (id, sink) = (id.clone(), sink.clone());
            disk.on_error(move |error| sink(&id, error));
        }
    }

    /// Makes a disk larger.
    ///
    /// # Errors
    /// [`DiskResizeError`].
    pub fn resize_disk(&self, id: &str, size: u64) -> Result<(), DiskResizeError> {
        match self.disks.iter().find(|(known, _)| known == id) {
            Some((_, disk)) => {
                disk.grow(size).map_err(|source| DiskResizeError::Image { id: id.to_owned(), source })
            }
            None => {
                let names: Vec<&str> = self.disks.iter().map(|(id, _)| id.as_str()).collect();
                let disks = match names.as_slice() {
                    [] => "this VM has none".to_owned(),
                    names => format!("this VM has {}", names.join(", ")),
                };
                Err(DiskResizeError::NoDisk { id: id.to_owned(), disks })
            }
        }
    }
}

/// What all devices are wired to.
struct Wiring<'a> {
    interrupts: &'a Interrupts,
    pci: &'a PciRoot,
}

/// The other end of a network interface's cable.
fn connect(options: &NetOptions, vcpus: u8) -> Result<Arc<dyn Cable>, VirtioError> {
    let pairs = u16::from(vcpus).min(MAX_PAIRS);
    Ok(match options.backend()? {
        NetBackend::User(forwards) => {
            let ports = |protocol: Protocol| {
                let of_it = forwards.iter().filter(|f| f.protocol == protocol);
                of_it.map(passt_port).collect::<Vec<String>>()
            };
            Arc::new(Stream::passt(&ports(Protocol::Tcp), &ports(Protocol::Udp))?)
        }
        NetBackend::Tap(name) => Arc::new(Tap::existing(name, pairs)?),
        NetBackend::Bridge(name) => Arc::new(Tap::on_bridge(name, pairs)?),
        NetBackend::Socket(path) => Arc::new(Stream::connect(path)?),
    })
}

/// A forwarding as passt's options take it.
fn passt_port(forward: &Forward) -> String {
    let address = forward.address.map_or(String::new(), |address| format!("{address}/"));
    format!("{address}{}:{}", forward.host_port, forward.guest_port)
}

fn open_disk(options: &DiskOptions, index: usize, config: &MachineConfig) -> Result<Block, VirtioError> {
    let image = berth_disk::open(&OpenOptions {
        path: options.path.clone(),
        format: options.format,
        read_only: options.ro,
        cache: options.cache,
    })?;
    let block = BlockOptions {
        serial: options.serial.clone().unwrap_or_default(),
        writethrough: options.cache == CacheMode::Writethrough,
        queues: config.vcpus.into(),
        no_ring: false,
    };
    let names = (0..config.vcpus).map(|queue| thread_name(&config.name, &format!("disk{index}.{queue}")));
    Ok(Block::new(image.into(), block, names.collect()))
}
