//! What guest this is.

use std::fs;

use berth_agent_protocol::GuestInfo;

/// Longest text that is passed on.
const MOST: usize = 200;

/// Looks it up.
pub fn info() -> GuestInfo {
    GuestInfo {
        kernel: line("/proc/sys/kernel/osrelease"),
        hostname: line("/proc/sys/kernel/hostname"),
        uptime_ms: uptime_ms(&line("/proc/uptime")),
        os: pretty_name(&fs::read_to_string("/etc/os-release").unwrap_or_default()),
        agent: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

/// The first line of a file; empty if there is none.
fn line(path: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().next().unwrap_or_default().chars().take(MOST).collect()
}

/// Seconds with two digits behind the point, in the first field of proc_uptime(5).
fn uptime_ms(uptime: &str) -> u64 {
    let seconds = uptime.split(' ').next().and_then(|s| s.parse::<f64>().ok());
    // A cast of a float keeps to the bounds of the integer.
    (seconds.unwrap_or_default() * 1000.0) as u64
}

/// `PRETTY_NAME` of os-release(5), without its quotes.
fn pretty_name(os_release: &str) -> String {
    let value = os_release.lines().find_map(|l| l.strip_prefix("PRETTY_NAME=")).unwrap_or_default();
    value.trim_matches(['"', '\'']).chars().take(MOST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_texts_are_read() {
        assert_eq!(uptime_ms("12.34 45.00"), 12340);
        assert_eq!(uptime_ms(""), 0);
        let text = "NAME=x\nPRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\n";
        assert_eq!(pretty_name(text), "Debian GNU/Linux 12 (bookworm)");
        assert_eq!(pretty_name(""), "");
        let info = info();
        assert!(info.kernel.contains('.') && info.uptime_ms > 0, "{info:?}");
    }
}
