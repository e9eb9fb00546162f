//! What is asked of the host whatever the hypervisor is.

/// The model name of this host's processor, as `/proc/cpuinfo` has it; empty when it has none.
#[must_use]
pub fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model.map_or_else(String::new, |(_, name)| name.trim().to_owned())
}
