//! Status and events as people read them.

use serde_json::Value;

/// Whether a status answer (of one VM, or of an agent with several) says that everything is protected.
pub(crate) fn is_protected(answer: &Value) -> bool {
    match answer["vms"].as_array() {
        Some(vms) => !vms.is_empty() && vms.iter().all(|vm| vm["state"] == "protected"),
        None => answer["state"] == "protected",
    }
}

/// A status answer, a paragraph a VM.
pub(crate) fn status(answer: &Value) -> String {
    if answer["role"] == "witness" {
        return format!(
            "witness: {} VMs have a record, {} requests answered\n",
            answer["vms"], answer["answered"]
        );
    }
    match answer["vms"].as_array() {
        Some(vms) if vms.is_empty() => "no VM is backed up here\n".into(),
        Some(vms) => vms.iter().map(one).collect::<Vec<_>>().join("\n"),
        None => one(answer),
    }
}

fn one(vm: &Value) -> String {
    let name = vm["vm"].as_str().unwrap_or("?");
    let mut lines = vec![match (vm["state"].as_str(), vm["reason"].as_str()) {
        (Some("protected"), _) => format!("{name}: Protected"),
        (_, Some(reason)) => format!("{name}: Not protected ({reason})"),
        _ => format!("{name}: unknown"),
    }];
    let mut field = |label: &str, value: Option<String>| {
        if let Some(value) = value {
            lines.push(format!("  {label:<16}{value}"));
        }
    };
    field(
        "role",
        vm["role"]
            .as_str()
            .map(|role| format!("{role} on {}", vm["host"].as_str().unwrap_or("?"))),
    );
    field("backup", vm["backup"].as_str().map(str::to_owned));
    field("detail", vm["detail"].as_str().map(str::to_owned));
    field("first copy", first_copy(&vm["first_copy"]));
    field("epoch", epoch(vm));
    field("on time", percent(&vm["epoch_on_time_ratio"]));
    field("pause", milliseconds(&vm["pause_ms"]));
    field("pause parts", pause_parts(&vm["pause_parts_ms"]));
    field("commit lag", milliseconds(&vm["commit_lag_ms"]));
    field(
        "dirty pages",
        vm["dirty_pages"]["p50"]
            .as_u64()
            .map(|p| format!("p50 {p}, p99 {}", vm["dirty_pages"]["p99"])),
    );
    field("clock slip", percent(&vm["clock_slip_ratio"]));
    field("standby", vm["standby"].as_str().map(str::to_owned));
    field(
        "image",
        vm["image_bytes"]
            .as_u64()
            .map(|bytes| format!("{} MiB", bytes >> 20)),
    );
    lines.join("\n") + "\n"
}

fn first_copy(value: &Value) -> Option<String> {
    let (done, all) = (value["pages"].as_u64()?, value["of_pages"].as_u64()?);
    Some(format!(
        "{} % of {} MiB",
        (done * 100).checked_div(all)?,
        all >> 8
    ))
}

fn epoch(vm: &Value) -> Option<String> {
    let committed = vm["committed"].as_u64()?;
    let length = vm["epoch_ms"]
        .as_f64()
        .map_or(String::new(), |ms| format!(" of {ms} ms"));
    let lag = vm["lag_epochs"]
        .as_u64()
        .map_or(String::new(), |lag| format!(", {lag} behind"));
    Some(format!("{committed} committed{length}{lag}, term {}", vm["term"]))
}

fn percent(value: &Value) -> Option<String> {
    value.as_f64().map(|ratio| format!("{:.2} %", ratio * 100.0))
}

fn milliseconds(value: &Value) -> Option<String> {
    (value["count"].as_u64()? > 0).then(|| {
        format!(
            "p50 {} ms, p99 {} ms, max {} ms",
            value["p50"], value["p99"], value["max"]
        )
    })
}

/// The medians of the parts, in the order of time.
fn pause_parts(value: &Value) -> Option<String> {
    let part = |name: &str| Some(format!("{name} {}", value[name]["p50"].as_f64()?));
    let parts = ["stop", "barrier", "scan", "copy", "resume"].map(part);
    let parts: Option<Vec<String>> = parts.into_iter().collect();
    (value["stop"]["count"].as_u64()? > 0).then_some(())?;
    Some(format!("{} (p50, ms)", parts?.join(", ")))
}

/// Events, a line each.
pub(crate) fn events(events: &[Value]) -> String {
    let mut text = String::new();
    for event in events {
        let name = event["event"].as_str().unwrap_or("?");
        let vm = event["vm"].as_str().unwrap_or("");
        let unix_ms = event["unix_ms"].as_u64().unwrap_or(0);
        let time = humantime::format_rfc3339_millis(
            std::time::UNIX_EPOCH + std::time::Duration::from_millis(unix_ms),
        );
        text.push_str(&format!("{time} {vm} {name} {}\n", event["detail"]));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_status_leads_with_protected_or_the_reason_why_not() {
        let text = status(&json!({"vm": "web", "state": "not_protected", "reason": "no backup"}));
        assert!(text.starts_with("web: Not protected (no backup)\n"), "{text}");
        assert!(status(&json!({"vm": "web", "state": "protected"})).starts_with("web: Protected\n"));
    }

    #[test]
    fn the_parts_of_a_pause_are_shown_in_the_order_of_time() {
        let part = |p50: f64| json!({"p50": p50, "p99": 9.0, "max": 9.0, "count": 3});
        let parts = json!({"barrier": part(0.002), "copy": part(0.4), "resume": part(0.05), "scan": part(0.1), "stop": part(0.07)});
        let text = status(&json!({"vm": "web", "state": "protected", "pause_parts_ms": parts}));
        assert!(
            text.contains("stop 0.07, barrier 0.002, scan 0.1, copy 0.4, resume 0.05 (p50, ms)"),
            "{text}"
        );
        assert!(!status(&json!({"vm": "web", "state": "protected"})).contains("pause"));
    }

    #[test]
    fn an_agent_is_protected_when_each_of_its_vms_is() {
        let one = json!({"state": "protected"});
        assert!(is_protected(&json!({"vms": [one, one]})));
        assert!(!is_protected(&json!({"vms": [one, {"state": "not_protected"}]})));
        assert!(!is_protected(&json!({"vms": []})));
    }
}
