//! Numbers in narrow columns.

/// A percentage, in six characters.
pub fn percent(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(v) if v < 9999.95 => format!("{v:.1}"),
        Some(v) => format!("{v:.0}"),
    }
}

/// Bytes or bytes a second, in five characters: with a unit of 1024, and a digit behind the point below 10.
pub fn bytes(value: Option<f64>) -> String {
    let Some(mut value) = value else { return "-".to_owned() };
    for unit in ["", "K", "M", "G", "T", "P"] {
        if value < 999.5 {
            let digits = usize::from(value < 9.95 && !unit.is_empty());
            return format!("{value:.digits$}{unit}");
        }
        value /= 1024.0;
    }
    "huge".to_owned()
}

/// Bytes that are counted.
pub fn size(value: Option<u64>) -> String {
    bytes(value.map(|v| v as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stay_in_their_columns() {
        let sizes =
            [0.0, 9.0, 999.0, 1000.0, 10_240.0, 1_048_575.0, 5e8, 1.5e12, 1e30].map(|b| bytes(Some(b)));
        assert_eq!(sizes, ["0", "9", "999", "1.0K", "10K", "1.0M", "477M", "1.4T", "huge"]);
        assert_eq!(
            [Some(0.0), Some(6400.0), Some(123_456.0), None].map(percent),
            ["0.0", "6400.0", "123456", "-"]
        );
        assert_eq!(size(Some(512 << 20)), "512M");
    }
}
