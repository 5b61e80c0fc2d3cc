//! Interrupt messages: what travels from IOAPIC, MSI or ICR to the local APICs.

/// What a message does at its destination (SDM volume 3, 11.5.1 and 11.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryMode {
    /// The vector, to all destinations.
    Fixed,
    /// The vector, to the destination with the lowest processor priority.
    LowestPriority,
    /// System management interrupt. No local APIC here has one: dropped.
    Smi,
    /// Reserved encoding: dropped.
    Reserved,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up IPI.
    Startup,
    /// The PIC's interrupt by message. The PIC here is wired to LINT0 instead: dropped.
    ExtInt,
}

impl DeliveryMode {
    /// From the three bits of an ICR, a redirection entry or MSI data.
    pub fn from_bits(bits: u64) -> Self {
        match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            3 => Self::Reserved,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::Startup,
            _ => Self::ExtInt,
        }
    }
}

/// An interrupt message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Interrupt vector, or the page of a start-up IPI.
    pub vector: u8,
    /// What it does.
    pub mode: DeliveryMode,
    /// APIC ID or logical destination.
    pub destination: u32,
    /// `destination` is a logical one.
    pub logical: bool,
    /// `destination` has 32 bits (from an x2APIC's ICR), not 8.
    pub wide: bool,
    /// Level-triggered: the EOI goes to the IOAPIC.
    pub level: bool,
}

impl Message {
    /// Whether it goes to every local APIC.
    pub fn is_broadcast(&self) -> bool {
        self.destination == if self.wide { u32::MAX } else { 0xff }
    }

    /// A message signalled interrupt: a write of `data` to `address` (SDM volume 3, 11.11). `None` if the address
    /// is not in the APICs' window.
    pub fn from_msi(address: u64, data: u32) -> Option<Self> {
        const WINDOW: u64 = 0xfee;
        const LOGICAL: u64 = 1 << 2;
        const LEVEL: u32 = 1 << 15;
        (address >> 20 == WINDOW).then(|| Self {
            vector: data as u8,
            mode: DeliveryMode::from_bits(u64::from(data) >> 8),
            destination: (address >> 12) as u32 & 0xff,
            logical: address & LOGICAL != 0,
            wide: false,
            level: data & LEVEL != 0,
        })
    }

    /// Address and data of the same message as an MSI, for a local APIC of the engine. `None` where that cannot be,
    /// and for what local APICs here drop.
    pub fn to_msi(self) -> Option<(u64, u32)> {
        const WINDOW: u64 = 0xfee0_0000;
        const ASSERT: u32 = 1 << 14;
        let mode = match self.mode {
            DeliveryMode::Fixed => 0,
            DeliveryMode::LowestPriority => 1,
            DeliveryMode::Nmi => 4,
            DeliveryMode::Init => 5,
            DeliveryMode::Startup => 6,
            DeliveryMode::Smi | DeliveryMode::Reserved | DeliveryMode::ExtInt => return None,
        };
        let destination = u64::from(u8::try_from(self.destination).ok()?);
        let address = WINDOW | destination << 12 | u64::from(self.logical) << 2;
        Some((address, u32::from(self.vector) | mode << 8 | ASSERT | u32::from(self.level) << 15))
    }
}

/// What decides whether a message reaches a local APIC; packed so that other threads read it at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Route {
    /// Logical destination register as it reads in the APIC's mode.
    pub ldr: u32,
    /// Destination format: flat, not cluster (xAPIC only).
    pub flat: bool,
    /// Enabled in IA32_APIC_BASE.
    pub enabled: bool,
    /// In x2APIC mode.
    pub x2apic: bool,
    /// Enabled in the spurious-interrupt vector register.
    pub software_enabled: bool,
}

impl Route {
    pub fn pack(self) -> u64 {
        u64::from(self.ldr)
            | u64::from(self.flat) << 32
            | u64::from(self.enabled) << 33
            | u64::from(self.x2apic) << 34
            | u64::from(self.software_enabled) << 35
    }
    pub fn unpack(bits: u64) -> Self {
        Self {
            ldr: bits as u32,
            flat: bits >> 32 & 1 != 0,
            enabled: bits >> 33 & 1 != 0,
            x2apic: bits >> 34 & 1 != 0,
            software_enabled: bits >> 35 & 1 != 0,
        }
    }

    /// Whether the APIC with `id` is a destination of `message` (SDM volume 3, 11.6.2 and 11.12.10).
    pub fn matches(self, id: u8, message: &Message) -> bool {
        let destination = message.destination;
        if message.is_broadcast() {
            return true;
        }
        if !message.logical {
            return destination == u32::from(id);
        }
        if self.x2apic {
            // The cluster in the upper half, a bit for each of its members in the lower.
            return destination >> 16 == self.ldr >> 16 && destination & self.ldr & 0xffff != 0;
        }
        let ldr = self.ldr >> 24;
        if destination > 0xff {
            return false;
        }
        if self.flat {
            return destination & ldr != 0;
        }
        let cluster = destination >> 4;
        (cluster == 0xf || cluster == ldr >> 4) && destination & ldr & 0xf != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logical(destination: u32) -> Message {
        let mode = DeliveryMode::Fixed;
        Message { vector: 0x40, mode, destination, logical: true, wide: false, level: false }
    }
    fn xapic(ldr: u32, flat: bool) -> Route {
        Route { ldr: ldr << 24, flat, enabled: true, x2apic: false, software_enabled: true }
    }

    #[test]
    fn flat_cluster_and_x2apic_logical_destinations() {
        assert!(xapic(0b0100, true).matches(9, &logical(0b0110)));
        assert!(!xapic(0b0100, true).matches(9, &logical(0b0010)));
        assert!(xapic(0x24, false).matches(9, &logical(0x26)));
        assert!(!xapic(0x24, false).matches(9, &logical(0x36)));
        assert!(xapic(0x24, false).matches(9, &logical(0xf4)));
        let x2 = Route { ldr: 0x0002_0008, x2apic: true, ..xapic(0, true) };
        let wide = |destination| Message { wide: true, ..logical(destination) };
        assert!(x2.matches(35, &wide(0x0002_000c)));
        assert!(!x2.matches(35, &wide(0x0001_000c)));
        assert!(!x2.matches(35, &wide(0xff)));
        assert!(x2.matches(35, &wide(u32::MAX)));
    }

    #[test]
    fn routes_survive_packing() {
        let r = Route { ldr: 0xdead_beef, flat: true, enabled: false, x2apic: true, software_enabled: true };
        assert_eq!(Route::unpack(r.pack()), r);
    }

    #[test]
    fn msi_fields() {
        let m = Message::from_msi(0xfee0_3004, 0xc141).unwrap();
        assert_eq!((m.vector, m.mode, m.destination), (0x41, DeliveryMode::LowestPriority, 3));
        assert!(m.logical && m.level && !m.wide);
        assert_eq!(m.to_msi(), Some((0xfee0_3004, 0xc141)));
        assert_eq!(Message { destination: 256, ..m }.to_msi(), None);
        assert_eq!(Message::from_msi(0xfed0_0000, 0x41), None);
        assert_eq!(Message::from_msi(0x1_fee0_0000, 0x41), None);
    }
}
