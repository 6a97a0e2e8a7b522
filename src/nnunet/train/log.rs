//! What a training leaves to be read: nnU-Net's text log, and metrics as JSON lines.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::error::{Error, Result};

/// The log files of one run.
#[derive(Debug)]
pub(super) struct Log {
    path: PathBuf,
    file: File,
    metrics: PathBuf,
}

impl Log {
    /// Begins a text log named after the time, as nnU-Net names it; metrics are appended to those of earlier runs.
    pub(super) fn begin(folder: &Path) -> Result<Self> {
        let [year, month, day, hour, minute, second] = utc(seconds_since_1970());
        let name = format!("training_log_{year}_{month}_{day}_{hour:02}_{minute:02}_{second:02}.txt");
        let path = folder.join(name);
        let file =
            OpenOptions::new().create(true).append(true).open(&path).map_err(|e| Error::io("write", &path, e))?;
        Ok(Self { path, file, metrics: folder.join(super::files::METRICS) })
    }

    /// One line with the time before it.
    pub(super) fn line(&mut self, text: &str) -> Result<()> {
        let now = seconds_since_1970();
        let [year, month, day, hour, minute, second] = utc(now);
        let micros = (now.fract() * 1e6) as u32;
        let line = format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{micros:06}: {text}\n");
        self.file.write_all(line.as_bytes()).map_err(|e| Error::io("write", &self.path, e))
    }

    /// One JSON object on a line of its own.
    pub(super) fn metrics(&self, values: &impl Serialize) -> Result<()> {
        let io = |e| Error::io("write", &self.metrics, e);
        let mut line = serde_json::to_vec(values).map_err(|e| io(e.into()))?;
        line.push(b'\n');
        let mut file = OpenOptions::new().create(true).append(true).open(&self.metrics).map_err(io)?;
        file.write_all(&line).map_err(io)
    }
}

/// Seconds since 1970, as nnU-Net's time stamps count.
pub(super) fn seconds_since_1970() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64()
}

/// Year, month, day, hour, minute and second of Universal Time (Hinnant, "chrono-compatible low-level date algorithms").
fn utc(seconds: f64) -> [i64; 6] {
    let seconds = seconds as i64;
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Days since 1 March of year 0, in eras of 400 years.
    let z = days + 719_468;
    let (era, day_of_era) = (z.div_euclid(146_097), z.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let (day, month) =
        (day_of_year - (153 * shifted + 2) / 5 + 1, if shifted < 10 { shifted + 3 } else { shifted - 9 });
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    [year, month, day, rest / 3600, rest / 60 % 60, rest % 60]
}

#[cfg(test)]
mod tests {
    use super::utc;

    #[test]
    fn days_have_their_dates() {
        assert_eq!(utc(0.0), [1970, 1, 1, 0, 0, 0]);
        assert_eq!(utc(951_782_399.9), [2000, 2, 28, 23, 59, 59]);
        assert_eq!(utc(951_782_400.0), [2000, 2, 29, 0, 0, 0]);
        assert_eq!(utc(1_795_867_384.0), [2026, 11, 28, 12, 3, 4]);
        assert_eq!(utc(4_107_542_400.0), [2100, 3, 1, 0, 0, 0]);
    }
}
