//! How many VMs there are at each step.

use std::str::FromStr;

/// Most VMs of a rehearsal.
const MOST: u16 = 512;

/// The numbers of VMs that somebody asked for: `A..B` or a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counts(Vec<u16>);

impl Counts {
    /// The steps, from few to many; there is at least one.
    pub fn steps(&self) -> &[u16] {
        &self.0
    }
}

/// What cannot be asked for.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("write 1..16, or a list that grows such as 1,2,8; from 1 to {MOST} VMs are possible")]
pub struct NoCounts;

impl FromStr for Counts {
    type Err = NoCounts;

    fn from_str(text: &str) -> Result<Self, NoCounts> {
        let number = |text: &str| text.trim().parse().ok().filter(|n| (1..=MOST).contains(n)).ok_or(NoCounts);
        if let Some((from, to)) = text.split_once("..") {
            let (from, to) = (number(from)?, number(to)?);
            return if from <= to { Ok(Self(growing(from, to))) } else { Err(NoCounts) };
        }
        let list = text.split(',').map(number).collect::<Result<Vec<u16>, _>>()?;
        if list.is_sorted_by(|a, b| a < b) { Ok(Self(list)) } else { Err(NoCounts) }
    }
}

/// Steps by half as much again, but by one at least: ratios are compared, and not numbers.
fn growing(from: u16, to: u16) -> Vec<u16> {
    let mut steps = vec![from];
    let mut last = from;
    while last < to {
        last = (last + last / 2).max(last + 1).min(to);
        steps.push(last);
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_grow_by_half_and_end_where_they_are_to() {
        let steps = |text: &str| text.parse::<Counts>().unwrap().0;
        assert_eq!(steps("1..16"), [1, 2, 3, 4, 6, 9, 13, 16]);
        assert_eq!(steps("3..3"), [3]);
        assert_eq!(steps("1..2"), [1, 2]);
        assert_eq!(steps("1, 5,512"), [1, 5, 512]);
        assert_eq!(steps("1..512").last(), Some(&512));
    }

    #[test]
    fn others_are_refused() {
        for text in ["", "0", "513", "2..1", "1..", "..3", "1,1", "2,1", "1;2", "-1", "a", "1..99999"] {
            assert_eq!(text.parse::<Counts>(), Err(NoCounts), "{text:?}");
        }
    }
}
