//! Facts about this machine and process, from Linux's /proc and /sys; `None` elsewhere.

/// Most memory this process held at once, in bytes.
pub(super) fn peak_process_bytes() -> Option<u64> {
    kilobytes("/proc/self/status", "VmHWM")
}

/// Memory of the machine: all of it, and what can be had without swapping.
pub(super) fn memory_bytes() -> Option<(u64, u64)> {
    Some((kilobytes("/proc/meminfo", "MemTotal")?, kilobytes("/proc/meminfo", "MemAvailable")?))
}

/// Setting of transparent huge pages: "always", "madvise" or "never".
pub(super) fn huge_pages() -> Option<String> {
    let text = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").ok()?;
    Some(text.split_once('[')?.1.split_once(']')?.0.to_owned())
}

/// The processor's name.
pub(super) fn processor() -> Option<String> {
    field(&std::fs::read_to_string("/proc/cpuinfo").ok()?, "model name").map(Into::into)
}

/// `key: 123 kB` in `file`, in bytes.
fn kilobytes(file: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let kb: u64 = field(&text, key)?.split_whitespace().next()?.parse().ok()?;
    kb.checked_mul(1024)
}

fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|l| l.split_once(':').filter(|(k, _)| k.trim() == key)).map(|(_, v)| v.trim())
}

/// A size for people: `1.5 GiB`.
pub(super) fn human(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}
