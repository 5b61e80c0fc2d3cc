//! Names of the VM's threads, as `ps -T` shows them.

/// Longest name that Linux keeps for a thread, in bytes (`TASK_COMM_LEN` without the NUL).
const MAX_LEN: usize = 15;

/// `VM/ROLE`, with the VM's name cut so that the role stays whole. Control characters become `_`.
pub fn thread_name(vm: &str, role: &str) -> String {
    let room = MAX_LEN.saturating_sub(role.len() + 1);
    let mut name = String::new();
    for c in vm.chars().map(|c| if c.is_control() { '_' } else { c }) {
        if name.len() + c.len_utf8() > room {
            break;
        }
        name.push(c);
    }
    format!("{name}/{role}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_role_stays_whole() {
        assert_eq!(thread_name("web", "vcpu0"), "web/vcpu0");
        assert_eq!(thread_name("a-long-name-for-a-vm", "vcpu63"), "a-long-n/vcpu63");
        assert_eq!(thread_name("äääääääää", "vcpu1"), "ääää/vcpu1");
        assert_eq!(thread_name("a\0b\n", "vcpu1"), "a_b_/vcpu1");
        assert_eq!(thread_name("", "vcpu1"), "/vcpu1");
    }
}
