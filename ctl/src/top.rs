//! `romulus top`: all VMs of all daemons on this host, refreshed, in a terminal.
//!
//! The terminal is given back however the view ends. Without a terminal the table is printed once.

use std::collections::HashMap;
use std::io::{IsTerminal as _, Write as _, stdout};
use std::time::{Duration, Instant};

use crossterm::event::{Event, KeyCode, KeyModifiers};
use crossterm::{cursor, event, execute, queue, style, terminal};
use serde_json::Value;

use crate::args::TopOptions;
use crate::daemons::{self, Answered};
use crate::exit;

/// The columns: heading and width; the last one takes what is left.
const COLUMNS: [(&str, usize); 9] = [
    ("VM", 16),
    ("ROLE", 8),
    ("STATE", 14),
    ("LAG", 5),
    ("PAUSE P99", 11),
    ("COMMIT P99", 11),
    ("DIRTY", 8),
    ("MIB/S", 8),
    ("", 0),
];

/// Runs the view.
pub(crate) async fn run(options: TopOptions) -> anyhow::Result<u8> {
    let mut rates = Rates::default();
    if options.once || options.admin.json || !stdout().is_terminal() {
        let rows = look(&options, &mut rates).await?;
        if options.admin.json {
            let rows: Vec<&Value> = rows.iter().map(|row| &row.vm).collect();
            println!(
                "{}",
                serde_json::to_string_pretty(&serde_json::json!({"schema": 1, "vms": rows}))?
            );
        } else {
            for line in table(&rows, usize::MAX) {
                println!("{}", line.trim_end());
            }
        }
        return Ok(exit::OK);
    }
    let _screen = Screen::enter()?;
    loop {
        let shown = match look(&options, &mut rates).await {
            Ok(rows) => table(&rows, usize::from(terminal::size()?.0)),
            Err(error) => vec![format!("{error:#}")],
        };
        draw(&shown)?;
        let interval = options.interval.max(Duration::from_millis(100));
        if tokio::task::spawn_blocking(move || asked_to_end(interval)).await?? {
            return Ok(exit::OK);
        }
    }
}

/// The terminal in its own screen, until this is dropped.
struct Screen;

impl Screen {
    fn enter() -> std::io::Result<Self> {
        terminal::enable_raw_mode()?;
        let screen = Self;
        execute!(stdout(), terminal::EnterAlternateScreen, cursor::Hide)?;
        Ok(screen)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that is gone needs no repair.
        let _ = execute!(stdout(), cursor::Show, terminal::LeaveAlternateScreen);
        let _ = terminal::disable_raw_mode();
    }
}

/// Waits for a key for so long; true when it means the end.
fn asked_to_end(interval: Duration) -> std::io::Result<bool> {
    let until = Instant::now() + interval;
    while event::poll(until.saturating_duration_since(Instant::now()))? {
        match event::read()? {
            Event::Key(key) => {
                let interrupt = key.code == KeyCode::Char('c') && key.modifiers == KeyModifiers::CONTROL;
                if interrupt || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) {
                    return Ok(true);
                }
            }
            Event::Resize(..) => return Ok(false),
            _ => {}
        }
    }
    Ok(false)
}

fn draw(lines: &[String]) -> std::io::Result<()> {
    let height = usize::from(terminal::size()?.1);
    let mut out = stdout();
    queue!(out, cursor::MoveTo(0, 0))?;
    for line in lines.iter().take(height.saturating_sub(1)) {
        queue!(
            out,
            style::Print(line),
            terminal::Clear(terminal::ClearType::UntilNewLine),
            cursor::MoveToNextLine(1)
        )?;
    }
    queue!(
        out,
        terminal::Clear(terminal::ClearType::FromCursorDown),
        style::Print("q: quit")
    )?;
    out.flush()
}

/// One line of the table.
struct Row {
    vm: Value,
    bytes_per_s: Option<u64>,
}

/// Bytes sent per second, from one look to the next.
#[derive(Default)]
struct Rates(HashMap<String, (Instant, u64)>);

impl Rates {
    fn of(&mut self, key: String, bytes: u64, now: Instant) -> Option<u64> {
        let (then, before) = self.0.insert(key, (now, bytes))?;
        let ms = u64::try_from(now.duration_since(then).as_millis()).ok()?;
        // A daemon that was started again counts from zero.
        (bytes.checked_sub(before)? * 1000).checked_div(ms)
    }
}

async fn look(options: &TopOptions, rates: &mut Rates) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for Answered { socket, answer } in daemons::ask_all(&options.admin, "/v1/status").await? {
        let Ok(status) = answer else { continue };
        for vm in daemons::vms(&status) {
            if !daemons::is_wanted(vm, options.admin.vm()) {
                continue;
            }
            let key = format!("{} {}", socket.display(), vm["vm"]);
            let bytes = vm["wire_bytes"].as_u64();
            rows.push(Row {
                bytes_per_s: bytes.and_then(|bytes| rates.of(key, bytes, Instant::now())),
                vm: vm.clone(),
            });
        }
    }
    rows.sort_by_key(|row| (row.vm["state"] == "protected", row.vm["vm"].to_string()));
    Ok(rows)
}

/// Headings, then a line a VM: those that are not protected first.
fn table(rows: &[Row], width: usize) -> Vec<String> {
    let protected = rows.iter().filter(|row| row.vm["state"] == "protected").count();
    let mut lines = vec![
        format!("{protected} of {} VMs protected", rows.len()),
        line(COLUMNS.map(|(heading, _)| heading.to_owned()), width),
    ];
    lines.extend(rows.iter().map(|row| line(cells(row), width)));
    lines
}

fn line(cells: [String; COLUMNS.len()], width: usize) -> String {
    let mut line = String::new();
    for (cell, (_, cell_width)) in cells.into_iter().zip(COLUMNS) {
        let shown: String = match cell_width {
            0 => cell,
            _ => cell.chars().take(cell_width - 1).collect(),
        };
        line.push_str(&format!("{shown:<cell_width$}"));
    }
    line.chars().take(width).collect()
}

fn cells(row: &Row) -> [String; COLUMNS.len()] {
    let vm = &row.vm;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let p99 = |value: &Value, unit: &str| match value["p99"].as_f64() {
        Some(p99) if value["count"] != 0 => format!("{p99} {unit}"),
        _ => String::new(),
    };
    let backup = vm["role"] == "backup";
    let state = if vm["state"] == "protected" {
        "Protected"
    } else {
        "Not protected"
    };
    let rest = match (vm["reason"].as_str(), vm["backup"].as_str()) {
        (Some(reason), _) => reason.to_owned(),
        (None, Some(host)) => format!("backup {host}"),
        (None, None) => format!("standby {}", vm["standby"].as_str().unwrap_or("?")),
    };
    let number = |value: &Value| value.as_u64().map_or(String::new(), |n| n.to_string());
    [
        text(&vm["vm"]),
        text(&vm["role"]),
        state.to_owned(),
        number(&vm["lag_epochs"]),
        p99(&vm["pause_ms"], "ms"),
        if backup {
            p99(&vm["apply_us"], "us")
        } else {
            p99(&vm["commit_lag_ms"], "ms")
        },
        number(&vm["dirty_pages"]["p50"]),
        row.bytes_per_s.map_or(String::new(), |bytes| {
            format!("{}.{}", bytes >> 20, ((bytes & 0xf_ffff) * 10) >> 20)
        }),
        rest,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn each_vm_has_a_line_that_leads_with_its_state_and_ends_with_the_reason() {
        let primary = json!({"vm": "web", "role": "primary", "state": "protected", "reason": null, "backup": "b2",
            "lag_epochs": 1, "pause_ms": {"p99": 1.5, "count": 9}, "commit_lag_ms": {"p99": 3.0, "count": 9},
            "dirty_pages": {"p50": 120}});
        let backup = json!({"vm": "a-name-that-is-far-too-long", "role": "backup", "state": "not_protected",
            "reason": "no backup", "apply_us": {"p99": 80}});
        let rows = [
            Row {
                vm: backup,
                bytes_per_s: None,
            },
            Row {
                vm: primary,
                bytes_per_s: Some(3 << 19),
            },
        ];
        let lines = table(&rows, 200);
        assert_eq!(lines[0], "1 of 2 VMs protected");
        assert!(
            lines[2].starts_with("a-name-that-is- backup  Not protected "),
            "{}",
            lines[2]
        );
        assert!(
            lines[2].contains("80 us") && lines[2].ends_with("no backup"),
            "{}",
            lines[2]
        );
        assert!(
            lines[3].starts_with("web             primary Protected "),
            "{}",
            lines[3]
        );
        assert!(
            lines[3].contains(" 1.5 ") && lines[3].ends_with("backup b2"),
            "{}",
            lines[3]
        );
        assert!(table(&rows, 20).iter().all(|line| line.chars().count() <= 20));
    }

    #[test]
    fn a_rate_is_of_the_time_between_two_looks_and_none_after_a_restart() {
        let mut rates = Rates::default();
        let now = Instant::now();
        let later = now + Duration::from_secs(2);
        assert_eq!(rates.of("a".into(), 100, now), None);
        assert_eq!(rates.of("a".into(), 300, later), Some(100));
        assert_eq!(rates.of("a".into(), 5, later + Duration::from_secs(1)), None);
    }
}
