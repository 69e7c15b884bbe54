//! How much of the machine's memory is free for what is held beside the weights.

/// Bytes that are free, `mapped` bytes of weights in memory: `MemAvailable` of the machine, or what a memory cgroup leaves if that is
/// less. None where the system does not say.
pub(super) fn available(mapped: u64) -> Option<u64> {
    free(&|path| std::fs::read_to_string(path).ok()).map(|free| free.saturating_sub(mapped))
}

/// Both count pages of files as free, as they can be read again: so those of mapped weights have to be taken away, which every step reads.
fn free(read: &dyn Fn(&str) -> Option<String>) -> Option<u64> {
    let field = |text: &str, name: &str| {
        let mut fields = text.lines().map(str::split_whitespace).find_map(|mut line| (line.next() == Some(name)).then_some(line))?;
        fields.next()?.parse::<u64>().ok()
    };
    let machine = field(&read("/proc/meminfo")?, "MemAvailable:")? * 1024;
    let number = |name: &str| read(&format!("/sys/fs/cgroup/{name}"))?.trim().parse::<u64>().ok();
    let (Some(max), Some(current)) = (number("memory.max"), number("memory.current")) else { return Some(machine) };
    let stat = read("/sys/fs/cgroup/memory.stat").unwrap_or_default();
    let files: u64 = ["inactive_file", "active_file"].iter().filter_map(|name| field(&stat, name)).sum();
    Some(machine.min(max.saturating_sub(current.saturating_sub(files))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_files_are_free_in_a_container_as_on_the_machine() {
        let free_of = |max: &str, stat: Option<&str>| {
            free(&|path| match path {
                "/proc/meminfo" => Some("MemTotal:       64 kB\nMemFree:   8 kB\nMemAvailable:       32 kB\n".into()),
                "/sys/fs/cgroup/memory.max" => Some(format!("{max}\n")),
                "/sys/fs/cgroup/memory.current" => Some("15000\n".into()),
                "/sys/fs/cgroup/memory.stat" => stat.map(Into::into),
                _ => None,
            })
        };
        // After a download, or a start before this one, most of what a container holds are pages of the model's files.
        let stat = Some("anon 2000\nfile 12500\ninactive_file 10000\nactive_file 2000\nslab 500\n");
        assert_eq!(free_of("16000", stat), Some(13_000));
        assert_eq!(free_of("16000", None), Some(1000));
        assert_eq!(free_of("90000", stat), Some(32 << 10), "no more than the machine has");
        assert_eq!(free_of("max", stat), Some(32 << 10));
        assert_eq!(free_of("10", Some("inactive_file 99999")), Some(10), "no more than the limit");
        assert_eq!(free(&|_| None), None);
        let all = free(&|path| std::fs::read_to_string(path).ok()).expect("Linux says");
        assert!(available(u64::MAX) == Some(0) && available(0).is_some_and(|now| now.abs_diff(all) < all / 2));
    }
}
