//! The kernel command line, as far as it is meant for this program.

/// What the command line asks of init.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct CommandLine {
    /// `berth.name=`: the host name.
    pub name: Option<String>,
    /// `berth.run=`: a shell command to run instead of the interactive shell.
    pub command: Option<String>,
    /// `berth.load=`: the kind of load that `berth rehearse` wants instead of the shell.
    pub load: Option<String>,
    /// `berth.winsize=`: columns and rows of the terminal at the other end of the console.
    pub window: Option<(u16, u16)>,
}

impl CommandLine {
    /// Reads `/proc/cmdline`; without it everything is at its default.
    pub fn read() -> Self {
        Self::parse(&std::fs::read_to_string("/proc/cmdline").unwrap_or_default())
    }

    /// Takes the `berth.*` words; of several with the same name the last counts, as in the kernel.
    pub fn parse(text: &str) -> Self {
        let mut found = Self::default();
        for word in words(text) {
            match word.split_once('=') {
                Some(("berth.name", v)) if !v.is_empty() => found.name = Some(v.to_owned()),
                Some(("berth.run", v)) if !v.is_empty() => found.command = Some(v.to_owned()),
                Some(("berth.load", v)) if !v.is_empty() => found.load = Some(v.to_owned()),
                Some(("berth.winsize", v)) => found.window = parse_window(v),
                _ => {}
            }
        }
        found
    }
}

fn parse_window(text: &str) -> Option<(u16, u16)> {
    let (columns, rows) = text.split_once('x')?;
    Some((columns.parse().ok()?, rows.parse().ok()?))
}

/// Splits as the kernel does (`next_arg` in `lib/cmdline.c`): at white space outside double quotes; the quotes
/// themselves are dropped; `--` ends the kernel's part.
fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quoted = false;
    for c in text.chars() {
        match c {
            '"' => quoted = !quoted,
            c if c.is_whitespace() && !quoted => {
                if word == "--" {
                    return words;
                }
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
            }
            c => word.push(c),
        }
    }
    if !word.is_empty() && word != "--" {
        words.push(word);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_its_own_words_and_no_others() {
        let c =
            CommandLine::parse("console=ttyS0 berth.name=web1 quiet berth.winsize=120x40 berth.load=cpu\n");
        assert_eq!(c.load.as_deref(), Some("cpu"));
        assert_eq!(c.name.as_deref(), Some("web1"));
        assert_eq!(c.window, Some((120, 40)));
        assert_eq!(c.command, None);
    }

    #[test]
    fn quotes_keep_a_command_together() {
        let by_value = CommandLine::parse(r#"berth.run="echo 'a  b'; exit 3" quiet"#);
        assert_eq!(by_value.command.as_deref(), Some("echo 'a  b'; exit 3"));
        let by_word = CommandLine::parse(r#""berth.run=uname -a""#);
        assert_eq!(by_word.command.as_deref(), Some("uname -a"));
    }

    #[test]
    fn the_last_of_a_name_counts_and_two_dashes_end_the_line() {
        let c = CommandLine::parse("berth.name=a berth.name=b -- berth.name=c");
        assert_eq!(c.name.as_deref(), Some("b"));
    }

    #[test]
    fn nonsense_is_ignored() {
        let c = CommandLine::parse("berth.winsize=wide berth.run= berth.name \"");
        assert_eq!(c, CommandLine::default());
    }
}
