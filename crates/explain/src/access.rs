//! Which accesses a page allows, and the fault that the others raise (SDM volume 3, 4.6 and 4.7).

use std::fmt;

use berth_cpu::bits::{pf_error, vector};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::hex::Hex;
use crate::paging::{Paging, PagingMode};
use crate::walk::{End, Page, Walk};

/// What an access does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum AccessKind {
    /// Load.
    #[default]
    Read,
    /// Store.
    Write,
    /// Instruction fetch.
    Execute,
}

impl AccessKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Read, Self::Write, Self::Execute];

    /// As a verb.
    pub fn verb(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Execute => "execute",
        }
    }
}

/// Who accesses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Privilege {
    /// CPL 3.
    User,
    /// CPL 0 to 2.
    #[default]
    Supervisor,
}

impl Privilege {
    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Supervisor => "supervisor",
        }
    }
}

/// An access to ask about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Access {
    /// What it does.
    pub kind: AccessKind,
    /// Who does it. Of the supervisor it is an explicit access with RFLAGS.AC clear.
    pub privilege: Privilege,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} by the {}", self.kind.verb(), self.privilege.name())
    }
}

/// Why a page forbids an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denial {
    /// A level has U/S clear.
    SupervisorPage,
    /// A level has R/W clear.
    ReadOnly,
    /// A level has NX set.
    NoExecute,
    /// CR4.SMEP: the supervisor does not execute user pages.
    Smep,
    /// CR4.SMAP: the supervisor does not access user pages.
    Smap,
}

impl Denial {
    /// For people: a sentence without its end.
    pub fn why(self) -> &'static str {
        match self {
            Self::SupervisorPage => "the page is the supervisor's: a level has U/S clear",
            Self::ReadOnly => "the page is read-only: a level has R/W clear",
            Self::NoExecute => "the page has no code: a level has NX set",
            Self::Smep => "the page is the user's, which the supervisor does not execute with CR4.SMEP",
            Self::Smap => {
                "the page is the user's, which the supervisor does not access with CR4.SMAP while RFLAGS.AC is clear"
            }
        }
    }

    /// In a word or two.
    pub fn short(self) -> &'static str {
        match self {
            Self::SupervisorPage => "supervisor's",
            Self::ReadOnly => "read-only",
            Self::NoExecute => "NX",
            Self::Smep => "SMEP",
            Self::Smap => "SMAP",
        }
    }
}

/// Whether `page` allows `access`.
///
/// # Errors
/// Why it does not.
pub fn check(page: &Page, paging: &Paging, access: Access) -> Result<(), Denial> {
    if paging.mode == PagingMode::Off {
        return Ok(());
    }
    let deny = |if_so: bool, why| if if_so { Err(why) } else { Ok(()) };
    let user = access.privilege == Privilege::User;
    deny(user && !page.user, Denial::SupervisorPage)?;
    match access.kind {
        AccessKind::Execute => {
            deny(!user && page.user && paging.smep, Denial::Smep)?;
            deny(page.no_execute && paging.nxe, Denial::NoExecute)
        }
        kind => {
            deny(!user && page.user && paging.smap, Denial::Smap)?;
            let enforced = user || paging.wp;
            deny(kind == AccessKind::Write && enforced && !page.writable, Denial::ReadOnly)
        }
    }
}

/// The fault that an access raises.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Fault {
    /// Vector of the exception.
    pub vector: u8,
    /// The manual's name of it, such as `#PF`.
    pub name: String,
    /// Its error code.
    pub error_code: Hex,
    /// The bits of the error code in words.
    pub error_words: Vec<String>,
    /// What CR2 has then; a general-protection fault does not set it.
    pub cr2: Option<Hex>,
    /// For people.
    pub why: String,
}

/// The fault that `access` to the address of `walk` raises, if it does.
pub fn fault(walk: &Walk, paging: &Paging, access: Access) -> Option<Fault> {
    let (present, reserved, why) = match &walk.end {
        End::NonCanonical => {
            return Some(Fault {
                vector: vector::GP,
                name: "#GP".to_owned(),
                error_code: Hex(0),
                error_words: Vec::new(),
                cr2: None,
                why:
                    "the address is not canonical: bits 48 to 63 are not all equal to bit 47 (a stack access \
                      raises #SS instead)"
                        .to_owned(),
            });
        }
        End::Page(page) => (true, false, check(page, paging, access).err()?.why().to_owned()),
        End::NotPresent => {
            let level = walk.steps.last().map_or("", |s| s.level.name());
            (false, false, format!("the entry of the {level} is not present"))
        }
        End::Reserved => {
            let (level, bits) = walk.steps.last().map_or(("", 0), |s| (s.level.name(), s.reserved));
            (true, true, format!("the entry of the {level} has reserved bits set: {bits:#x}"))
        }
        // What a CPU reads there is all ones or nothing of use; this is what Berth's own engine makes of it.
        End::NoTable { level, table } => (
            false,
            false,
            format!("the {} would be at guest physical {table}, where no RAM is", level.name()),
        ),
    };
    let fetch_shown = paging.smep || paging.nxe;
    let bits = [
        (present, pf_error::PRESENT, "page present: a rights violation", "page not present"),
        (access.kind == AccessKind::Write, pf_error::WRITE, "write", "not a write"),
        (access.privilege == Privilege::User, pf_error::USER, "user", "supervisor"),
        (reserved, pf_error::RESERVED, "reserved bit set", ""),
        (access.kind == AccessKind::Execute && fetch_shown, pf_error::FETCH, "instruction fetch", ""),
    ];
    let code = bits.iter().filter(|b| b.0).fold(0, |code, b| code | b.1);
    let words = bits.iter().map(|b| if b.0 { b.2 } else { b.3 }).filter(|w| !w.is_empty());
    Some(Fault {
        vector: vector::PF,
        name: "#PF".to_owned(),
        error_code: Hex(code.into()),
        error_words: words.map(str::to_owned).collect(),
        cr2: Some(Hex(walk.virt.0)),
        why,
    })
}
