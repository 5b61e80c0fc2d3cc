//! A guest that is made by hand: a few pages of a kernel with type information and three tasks.

use berth_memory::GuestPhysAddr;

use super::*;

/// Builds BTF.
#[derive(Default)]
struct Types {
    types: Vec<u8>,
    strings: Vec<u8>,
}

impl Types {
    fn new() -> Self {
        Self { types: Vec::new(), strings: vec![0] }
    }

    fn string(&mut self, text: &str) -> u32 {
        if text.is_empty() {
            return 0;
        }
        let at = self.strings.len() as u32;
        self.strings.extend(text.bytes().chain([0]));
        at
    }

    fn words(&mut self, words: &[u32]) {
        self.types.extend(words.iter().flat_map(|w| w.to_le_bytes()));
    }

    fn structure(&mut self, name: &str, members: &[(&str, u32, u32)]) {
        let name = self.string(name);
        self.words(&[name, 4 << 24 | members.len() as u32, 512]);
        for (name, type_id, bytes) in members {
            let name = self.string(name);
            self.words(&[name, *type_id, bytes * 8]);
        }
    }

    fn bytes(self) -> Vec<u8> {
        let (types, strings) = (self.types.len() as u32, self.strings.len() as u32);
        let header = [0, types, types, strings].map(u32::to_le_bytes).concat();
        [&MAGIC[..], &header, &self.types, &self.strings].concat()
    }
}

fn kernel_types() -> Vec<u8> {
    let mut t = Types::new();
    let int = t.string("int");
    t.words(&[int, 1 << 24, 4, 32]); // 1
    t.structure("list_head", &[("next", 1, 0), ("prev", 1, 8)]); // 2
    // 3, 4: anonymous, as in mm_struct
    t.structure("", &[("map_count", 1, 0), ("pgd", 1, 0x18)]);
    t.structure("mm_struct", &[("", 3, 0x40)]);
    let task = [
        ("tasks", 2, 0x20),
        ("mm", 4, 0x30),
        ("pid", 1, 0x38),
        ("tgid", 1, 0x3c),
        ("group_leader", 1, 0x40),
        ("comm", 1, 0x48),
    ];
    t.structure("task_struct", &task);
    t.bytes()
}

const IMAGE: u64 = 0xffff_ffff_8100_0000;
/// Guest physical memory is mapped here with a page of 2 MiB, as in the kernel's direct map.
const DIRECT: u64 = 0xffff_8880_0000_0000;
const ROOT: u64 = 0x1_0000;
const INIT: u64 = IMAGE + 0x7000;

struct Guest {
    memory: GuestMemory,
    paging: Paging,
}

impl Guest {
    fn new(types: &[u8]) -> Self {
        let memory = GuestMemory::new(2 << 20).unwrap();
        let paging = Paging {
            mode: PagingMode::FourLevel,
            cr3: ROOT,
            pse: false,
            nxe: true,
            wp: true,
            smep: true,
            smap: true,
            pge: true,
            physical_bits: 46,
        };
        let guest = Self { memory, paging };
        // The image and the direct map share their tables from the second level on: both show all memory.
        guest.put(ROOT + 511 * 8, 0x1_1003);
        guest.put(0x1_1000 + 510 * 8, 0x1_2003);
        guest.put(0x1_2000 + 8 * 8, 0x83);
        guest.put(ROOT + (DIRECT >> 39 & 511) * 8, 0x1_3003);
        guest.put(0x1_3000, 0x1_4003);
        guest.put(0x1_4000, 0x83);
        guest.memory.write(GuestPhysAddr(0x3ffc), types).unwrap();
        // Something that only looks like type information.
        guest.memory.write(GuestPhysAddr(0x2008), &[&MAGIC[..], &[0xff; 16]].concat()).unwrap();
        guest
    }

    fn put(&self, at: u64, value: u64) {
        self.memory.write(GuestPhysAddr(at), &value.to_le_bytes()).unwrap();
    }

    /// A task at guest physical `at`, seen at `virt`.
    fn task(&self, at: u64, virt: u64, pid: u32, name: &str, mm: u64) {
        self.put(at + 0x30, mm);
        self.put(at + 0x38, u64::from(pid) << 32 | u64::from(pid));
        self.put(at + 0x40, virt);
        self.memory.write(GuestPhysAddr(at + 0x48), &[name.as_bytes(), &[0]].concat()).unwrap();
    }

    fn link(&self, ring: &[(u64, u64)]) {
        for (i, (_, virt)) in ring.iter().enumerate() {
            let (at, next) = ring[(i + 1) % ring.len()];
            self.put(ring[i].0 + 0x20, next + 0x20);
            self.put(at + 0x28, virt + 0x20);
        }
    }

    fn with_tasks(self) -> Self {
        let (a, b) = (0x8000, 0x9000);
        // The name alone does not make a first task.
        self.memory.write(GuestPhysAddr(0x6048), b"swapper/0\0").unwrap();
        self.task(0x7000, INIT, 0, "swapper/0", 0);
        self.task(a, DIRECT + a, 1, "init", DIRECT + 0xa000);
        self.task(b, DIRECT + b, 2, "kthreadd", 0);
        self.put(0xa000 + 0x40 + 0x18, DIRECT + 0x1_5000);
        self.link(&[(0x7000, INIT), (a, DIRECT + a), (b, DIRECT + b)]);
        self
    }

    fn find(&self, pid: u32) -> Result<Process, ProcessError> {
        find_process(&self.memory, &self.paging, pid)
    }
}

#[test]
fn a_process_is_found_through_the_kernels_structures() {
    let guest = Guest::new(&kernel_types()).with_tasks();
    assert_eq!(guest.find(1), Ok(Process { pid: 1, name: "init".to_owned(), cr3: 0x1_5000 }));
    assert_eq!(guest.find(2), Err(ProcessError::KernelThread { pid: 2, name: "kthreadd".to_owned() }));
    assert_eq!(guest.find(7), Err(ProcessError::NoProcess { pid: 7, count: 2 }));
}

#[test]
fn the_kernels_tables_are_found_beside_a_programs() {
    let mut guest = Guest::new(&kernel_types()).with_tasks();
    guest.paging.cr3 = ROOT | PTI_USER | 0x801;
    // An empty root: the program's half of page-table isolation.
    guest.put(0x1_1000 + 511 * 8, 0);
    assert_eq!(guest.find(1).map(|p| p.cr3), Ok(0x1_5000));
}

#[test]
fn what_is_missing_is_named() {
    assert_eq!(Guest::new(b"").with_tasks().find(1), Err(ProcessError::NoTypes));
    assert_eq!(Guest::new(&kernel_types()).find(1), Err(ProcessError::NoInitTask));
    let mut other = Types::new();
    other.structure("task_struct", &[]);
    other.structure("mm_struct", &[]);
    other.structure("list_head", &[]);
    let missing = Guest::new(&other.bytes()).find(1);
    assert_eq!(missing, Err(ProcessError::NoMember { what: "task_struct.tasks" }));
    let mut guest = Guest::new(&kernel_types());
    guest.paging.mode = PagingMode::Pae;
    assert_eq!(guest.find(1), Err(ProcessError::NotLongMode));
}

#[test]
fn a_damaged_list_is_left() {
    let guest = Guest::new(&kernel_types()).with_tasks();
    // Task 1 leads to itself instead of to the next.
    guest.put(0x8020, DIRECT + 0x8020);
    assert_eq!(guest.find(7), Err(ProcessError::Inconsistent));
    // A pointer to nowhere.
    guest.put(0x8020, u64::MAX - 3);
    assert_eq!(guest.find(7), Err(ProcessError::Inconsistent));
}

#[test]
fn damaged_type_information_is_no_information() {
    let good = kernel_types();
    let read = |bytes: &[u8]| {
        Btf::read(|offset, data| {
            let from = bytes.get(offset as usize..)?;
            data.copy_from_slice(from.get(..data.len())?);
            Some(())
        })
    };
    assert!(read(&good).is_some());
    for len in 0..good.len() {
        assert!(read(&good[..len]).is_none(), "{len} bytes");
    }
    // Whatever single byte is wrong: an answer, and no panic.
    for at in 0..good.len() {
        for value in [0, 0x7f, 0xff] {
            let mut bytes = good.clone();
            bytes[at] = value;
            if let Some(btf) = read(&bytes) {
                let _ = Offsets::of(&btf);
            }
        }
    }
}
