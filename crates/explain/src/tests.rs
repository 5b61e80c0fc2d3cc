//! Page tables of every kind, made by hand.

use berth_cpu::CpuState;
use berth_cpu::bits::{cr0, cr4, efer};
use berth_memory::{GuestMemory, GuestPhysAddr, GuestVirtAddr, PageState};

use super::*;

const PHYSICAL_BITS: u8 = 46;

fn memory_with(entries: &[(u64, u64)]) -> GuestMemory {
    let memory = GuestMemory::new(1 << 20).unwrap();
    for (at, entry) in entries {
        memory.write(GuestPhysAddr(*at), &entry.to_le_bytes()).unwrap();
    }
    memory
}

/// A CPU with every protection, in 4-level paging with its root at 0x1000.
fn long_mode() -> CpuState {
    CpuState {
        cr0: cr0::PE | cr0::PG | cr0::WP,
        cr3: 0x1018,
        cr4: cr4::PAE | cr4::PGE | cr4::SMEP | cr4::SMAP,
        efer: efer::LME | efer::LMA | efer::NXE,
        ..CpuState::reset()
    }
}

fn at(memory: &GuestMemory, state: &CpuState, virt: u64) -> Option<u64> {
    translate(memory, &Paging::of(state, PHYSICAL_BITS), GuestVirtAddr(virt)).map(|p| p.0)
}

/// The machine of these tests: one device.
struct Board;
impl MachineView for Board {
    fn device_at(&self, at: GuestPhysAddr) -> Option<Device> {
        let device = Device { name: "clock".to_owned(), start: Hex(0xfed0_0000), len: 0x400 };
        (0xfed0_0000..0xfed0_0400).contains(&at.0).then_some(device)
    }
}

fn ask(memory: &GuestMemory, state: &CpuState, question: Question) -> Result<Explanation, ExplainError> {
    let subject = Subject { vm: "vm", vcpu: 0, state, physical_bits: PHYSICAL_BITS, memory, machine: &Board };
    explain(&subject, &question)
}

/// Pages of all sizes in the upper half, and faults of all kinds.
fn four_levels() -> GuestMemory {
    memory_with(&[
        (0x1000 + 511 * 8, 0x2003),
        (0x2000, 0x3003),
        (0x2008, 0x4000_0083),
        (0x3000, 0x4003),
        (0x3008, 0x60_0083),
        (0x4008, 0x8000_0000_0000_5003),
        // The lower half: a user page, read-only; a table with a reserved bit; one outside of RAM; a device.
        (0x1000, 0x6007),
        (0x6000, 0x7007),
        (0x7000, 0x8007),
        (0x8000, 0x9005),
        (0x8008, 1 << 50 | 0x9005),
        (0x8010, 0x0001_2345_6788),
        (0x8018, 0xfed0_0013),
        (0x8020, 0x9007),
        (0x7008, 0x4000_0007),
        (0x7010, 0x20_2087),
    ])
}

const UPPER: u64 = 0xffff_ff80_0000_0000;

#[test]
fn four_level_paging_with_pages_of_all_sizes() {
    let (memory, state) = (four_levels(), long_mode());
    assert_eq!(at(&memory, &state, UPPER + 0x1234), Some(0x5234));
    assert_eq!(at(&memory, &state, UPPER + 0x20_5678), Some(0x60_5678));
    assert_eq!(at(&memory, &state, UPPER + 0x4012_3456), Some(0x4012_3456));
    assert_eq!(at(&memory, &state, UPPER), None);
    assert_eq!(at(&memory, &state, 0x8000_0000_0000), None);
}

#[test]
fn pae_and_32_bit_paging() {
    let memory = memory_with(&[(0x1018, 0x2001), (0x2000, 0x3003), (0x3008, 0x5003), (0x2008, 0x60_0083)]);
    let pae = CpuState { efer: efer::NXE, cr3: 0x1000, ..long_mode() };
    assert_eq!(at(&memory, &pae, 0xc000_1234), Some(0x5234));
    assert_eq!(at(&memory, &pae, 0xc020_1234), Some(0x60_1234));
    assert_eq!(at(&memory, &pae, 0x1234), None);
    let memory = memory_with(&[(0x1c00, 0x2003), (0x2004, 0x5003), (0x1004, 0x80_0083), (0x1008, 0x80_6083)]);
    let legacy = CpuState { cr4: cr4::PSE, cr3: 0x1000, ..pae };
    assert_eq!(at(&memory, &legacy, 0xc000_1234), Some(0x5234));
    assert_eq!(at(&memory, &legacy, 0x40_1234), Some(0x80_1234));
    // PSE-36: an address above 4 GiB.
    assert_eq!(at(&memory, &legacy, 0x80_1234), Some(0x3_0080_1234));
    let no_large = CpuState { cr4: 0, ..legacy.clone() };
    assert_eq!(at(&memory, &no_large, 0x40_1234), None, "without PSE the entry points to a table");
    let real = CpuState { cr0: 0, ..legacy };
    assert_eq!(at(&memory, &real, 0x1234), Some(0x1234));
}

fn fault_of(virt: u64, kind: AccessKind, privilege: Privilege, state: &CpuState) -> Option<Fault> {
    let question =
        Question { address: Hex(virt), access: kind, privilege: Some(privilege), ..Question::default() };
    ask(&four_levels(), state, question).unwrap().fault
}

#[test]
fn accesses_fault_as_on_a_cpu() {
    use AccessKind::{Execute, Read, Write};
    use Privilege::{Supervisor, User};
    let state = long_mode();
    let code = |virt, kind, privilege, state: &CpuState| {
        fault_of(virt, kind, privilege, state).map(|f| (f.vector, f.error_code.0))
    };
    let check = |virt, kind, privilege, expected| {
        assert_eq!(code(virt, kind, privilege, &state), expected, "{virt:#x} {kind:?} {privilege:?}");
    };
    // Rights: P 1, write 2, user 4, reserved 8, fetch 16.
    check(0x0, Read, User, None);
    check(0x0, Write, User, Some((14, 7)));
    check(0x0, Execute, User, None);
    check(0x0, Read, Supervisor, Some((14, 1)));
    check(0x0, Execute, Supervisor, Some((14, 17)));
    check(0x4000, Write, User, None);
    check(UPPER + 0x1000, Read, Supervisor, None);
    check(UPPER + 0x1000, Write, Supervisor, None);
    check(UPPER + 0x1000, Execute, Supervisor, Some((14, 17)));
    check(UPPER + 0x1000, Read, User, Some((14, 5)));
    // Not present, reserved bits in a page and in a large page, a table outside of RAM.
    check(UPPER, Write, Supervisor, Some((14, 2)));
    check(0x2000, Execute, User, Some((14, 20)));
    check(0x1000, Read, User, Some((14, 13)));
    check(0x40_0000, Write, Supervisor, Some((14, 11)));
    check(0x20_0000, Read, User, Some((14, 4)));
    check(0x8000_0000_0000, Read, User, Some((13, 0)));

    let plain = CpuState { cr0: cr0::PE | cr0::PG, cr4: cr4::PAE, efer: efer::LMA, ..state.clone() };
    assert_eq!(code(0x0, Write, Supervisor, &plain), None, "without WP and SMAP");
    assert_eq!(
        code(UPPER + 0x1000, Read, Supervisor, &plain),
        Some((14, 9)),
        "bit 63 is reserved without NXE"
    );
    assert_eq!(code(0x2000, Execute, User, &plain), Some((14, 4)), "fetches are not told apart");
}

#[test]
fn faults_are_in_words() {
    let fault = fault_of(0x123, AccessKind::Write, Privilege::User, &long_mode()).unwrap();
    assert_eq!(fault.name, "#PF");
    assert_eq!(fault.cr2, Some(Hex(0x123)));
    assert_eq!(fault.error_words, ["page present: a rights violation", "write", "user"]);
    assert!(fault.why.contains("read-only"), "{}", fault.why);
    let fault = fault_of(UPPER, AccessKind::Read, Privilege::Supervisor, &long_mode()).unwrap();
    assert_eq!(fault.error_words, ["page not present", "not a write", "supervisor"]);
    assert_eq!(fault.why, "the entry of the PT is not present");
    let fault = fault_of(1 << 47, AccessKind::Read, Privilege::Supervisor, &long_mode()).unwrap();
    assert_eq!((fault.name.as_str(), fault.cr2), ("#GP", None));
}

#[test]
fn the_whole_way_of_an_address_in_ram() {
    let (memory, state) = (four_levels(), long_mode());
    memory.write(GuestPhysAddr(0x9000), b"resident").unwrap();
    let e = ask(&memory, &state, Question { address: Hex(0x4321), ..Question::default() }).unwrap();
    let steps: Vec<_> = e.levels.iter().map(|l| (l.level, l.index, l.entry_address.0, l.entry.0)).collect();
    assert_eq!(
        steps,
        [
            (Level::Pml4, 0, 0x1000, 0x6007),
            (Level::Pdpt, 0, 0x6000, 0x7007),
            (Level::Pd, 0, 0x7000, 0x8007),
            (Level::Pt, 4, 0x8020, 0x9007)
        ]
    );
    assert_eq!(e.levels[3].flags, ["present", "writable", "user"]);
    assert_eq!(e.physical, Some(Hex(0x9321)));
    assert_eq!(e.place, Some(Place::Ram { start: Hex(0), len: 1 << 20, state: Some(PageState::Resident) }));
    let host = e.host.clone().unwrap();
    assert_eq!(host.address.0, memory.host_address(GuestPhysAddr(0x9321), 1).unwrap().0);
    assert_eq!(host.pid, std::process::id());
    assert!(host.page.unwrap().present);
    // JSON has all of it.
    let json = serde_json::to_string(&e).unwrap();
    assert_eq!(serde_json::from_str::<Explanation>(&json).unwrap(), e);
}

#[test]
fn devices_and_holes_are_named() {
    let (memory, state) = (four_levels(), long_mode());
    let e = ask(&memory, &state, Question { address: Hex(0x3010), ..Question::default() }).unwrap();
    assert!(matches!(&e.place, Some(Place::Device(d)) if d.name == "clock"), "{e:?}");
    assert!(e.levels[3].flags.contains(&"cache-disabled".to_owned()), "{e:?}");
    let physical = |at| Question { address: Hex(at), space: Space::Physical, ..Question::default() };
    let e = ask(&memory, &state, physical(0xc000_0000)).unwrap();
    assert_eq!((e.place, e.host), (Some(Place::Nothing), None));
    let error = ask(&memory, &state, physical(1 << 46)).unwrap_err();
    assert!(error.to_string().contains("46 bits"), "{error}");
}

#[test]
fn another_root_and_another_width() {
    let (memory, state) = (four_levels(), long_mode());
    memory.write(GuestPhysAddr(0xa000), &0x6007_u64.to_le_bytes()).unwrap();
    let space = Space::Cr3(Hex(0xa000));
    let e = ask(&memory, &state, Question { address: Hex(0x4321), space, ..Question::default() }).unwrap();
    assert_eq!((e.levels[0].table, e.physical), (Hex(0xa000), Some(Hex(0x9321))));
    let pae = CpuState { efer: 0, ..state };
    let error = ask(&memory, &pae, Question { address: Hex(1 << 32), ..Question::default() }).unwrap_err();
    assert!(error.to_string().contains("PAE paging have 32 bits"), "{error}");
}

#[test]
fn the_default_access_is_a_read_by_whom_the_address_belongs_to() {
    let (memory, state) = (four_levels(), long_mode());
    for (address, privilege) in [(0x4000, Privilege::User), (UPPER + 0x1000, Privilege::Supervisor)] {
        let e = ask(&memory, &state, Question { address: Hex(address), ..Question::default() }).unwrap();
        assert_eq!(e.access, Some(Access { kind: AccessKind::Read, privilege }));
        assert_eq!(e.fault, None);
    }
}

#[test]
fn text_has_aligned_columns() {
    let (memory, state) = (four_levels(), long_mode());
    let question = Question { address: Hex(0), access: AccessKind::Write, ..Question::default() };
    let text = text::render(&ask(&memory, &state, question).unwrap());
    assert!(
        text.starts_with(
            "\
guest virtual     0x0                 of VM vm, vCPU 0
CR3               0x1018              4-level paging; CR0.WP CR4.PGE CR4.SMEP CR4.SMAP EFER.NXE

level  index  entry at            entry               flags
PML4       0  0x1000              0x0000000000006007  present, writable, user
PDPT       0  0x6000              0x0000000000007007  present, writable, user
PD         0  0x7000              0x0000000000008007  present, writable, user
PT         0  0x8000              0x0000000000009005  present, read-only, user

allowed           user                read, no write (read-only), execute
allowed           supervisor          no read (SMAP), no write (SMAP), no execute (SMEP)
fault             #PF (vector 14)     write by the user: the page is read-only: a level has R/W clear
  error code      0x7                 page present: a rights violation, write, user
  CR2             0x0
guest physical    0x9000              offset 0x0 in the page of 4 KiB at 0x9000
  there           RAM                 of 0x0 to 0xfffff; the page is untouched
host virtual      0x"
        ),
        "{text}"
    );
}
