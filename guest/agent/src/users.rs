//! Users and groups of the guest, from `/etc/passwd` and `/etc/group` (passwd(5), group(5)).
//!
//! A static program has no name service switch, so users that come from elsewhere (LDAP) are only known by number.

use std::fs;

/// Who runs a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Login name; the number where there is none.
    pub name: String,
    /// User ID.
    pub uid: u32,
    /// Group ID.
    pub gid: u32,
    /// All groups.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: String,
    /// Login shell.
    pub shell: String,
}

/// Why there is no such user.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UserError {
    /// The user.
    #[error("the guest has no user {0}")]
    User(String),
    /// The group.
    #[error("the guest has no group {0}")]
    Group(String),
}

impl User {
    /// The user that `USER` or `USER:GROUP` names, by names or numbers. A number without an entry is a user whose group
    /// has the same number.
    ///
    /// # Errors
    /// [`UserError`].
    pub fn find(text: &str) -> Result<Self, UserError> {
        let read = |path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
        find_in(&read("/etc/passwd"), &read("/etc/group"), text)
    }
}

fn find_in(passwd: &str, group: &str, text: &str) -> Result<User, UserError> {
    let (user, wanted_group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let mut found = passwd
        .lines()
        .filter_map(entry)
        .find(|u| u.name == user)
        .or_else(|| with_number(passwd, user.parse().ok()?))
        .ok_or_else(|| UserError::User(user.to_owned()))?;
    let groups = || group.lines().filter_map(group_entry);
    if let Some(wanted) = wanted_group {
        let by_name = groups().find(|(name, ..)| *name == wanted).map(|(_, gid, _)| gid);
        found.gid =
            by_name.or_else(|| wanted.parse().ok()).ok_or_else(|| UserError::Group(wanted.to_owned()))?;
        found.groups = vec![found.gid];
    } else {
        found.groups = vec![found.gid];
        let others = groups().filter(|(_, gid, members)| {
            *gid != found.gid && members.split(',').any(|member| member == found.name)
        });
        found.groups.extend(others.map(|(_, gid, _)| gid));
    }
    Ok(found)
}

fn with_number(passwd: &str, uid: u32) -> Option<User> {
    let known = passwd.lines().filter_map(entry).find(|u| u.uid == uid);
    Some(known.unwrap_or_else(|| User {
        name: uid.to_string(),
        uid,
        gid: uid,
        groups: Vec::new(),
        home: "/".to_owned(),
        shell: "/bin/sh".to_owned(),
    }))
    // All bits set means "no user" to the kernel.
    .filter(|u| u.uid != u32::MAX)
}

/// A line of passwd(5).
fn entry(line: &str) -> Option<User> {
    let fields: Vec<&str> = line.split(':').collect();
    let [name, _, uid, gid, _, home, shell] = fields[..] else { return None };
    let or = |text: &str, other: &str| if text.is_empty() { other.to_owned() } else { text.to_owned() };
    Some(User {
        name: name.to_owned(),
        uid: uid.parse().ok()?,
        gid: gid.parse().ok()?,
        groups: Vec::new(),
        home: or(home, "/"),
        shell: or(shell, "/bin/sh"),
    })
}

/// Name, number and members in a line of group(5).
fn group_entry(line: &str) -> Option<(&str, u32, &str)> {
    let mut fields = line.split(':');
    let name = fields.next()?;
    Some((name, fields.nth(1)?.parse().ok()?, fields.next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nann:x:1000:1000::/home/ann:\nbad line\n:::\n";
    const GROUP: &str = "root:x:0:\nann:x:1000:\nsudo:x:27:bob,ann\naudio:x:29:joann\nempty:x:30\n";

    fn find(text: &str) -> Result<User, UserError> {
        find_in(PASSWD, GROUP, text)
    }

    #[test]
    fn by_name_with_all_groups() {
        let ann = find("ann").unwrap();
        assert_eq!((ann.uid, ann.gid, ann.groups), (1000, 1000, vec![1000, 27]));
        assert_eq!((&*ann.home, &*ann.shell), ("/home/ann", "/bin/sh"));
        assert_eq!(find("root").unwrap().shell, "/bin/bash");
    }

    #[test]
    fn by_number_known_or_not() {
        assert_eq!(find("1000"), find("ann"));
        let nobody = find("4711").unwrap();
        assert_eq!((nobody.uid, nobody.gid, &*nobody.home), (4711, 4711, "/"));
        assert_eq!(find("4294967295"), Err(UserError::User("4294967295".to_owned())));
    }

    #[test]
    fn with_a_group_and_no_other() {
        let of = |text| find(text).map(|u| (u.gid, u.groups));
        assert_eq!(of("ann:audio"), Ok((29, vec![29])));
        assert_eq!(of("0:4"), Ok((4, vec![4])));
        assert_eq!(of("ann:wheel"), Err(UserError::Group("wheel".to_owned())));
        assert_eq!(of("bob"), Err(UserError::User("bob".to_owned())));
        assert_eq!(of(""), Err(UserError::User(String::new())));
    }
}
