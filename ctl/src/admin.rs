//! Commands that go to the daemons' admin sockets: status, events and orders.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::bail;
use serde_json::{Value, json};

use crate::args::{AdminOptions, EventsOptions, FailoverOptions, ForgetOptions};
use crate::daemons::{self, Answered};
use crate::{exit, render};

/// Version of the JSON in which several daemons answer at once.
const SCHEMA: u32 = 1;
/// Time from one look for new events to the next.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(500);

/// `romulus status`.
pub(crate) async fn status(options: AdminOptions) -> anyhow::Result<u8> {
    let path = route(&options, "status");
    if let Some(socket) = &options.admin {
        // What this one daemon says, as it says it.
        let answer = daemons::get(socket, &path).await?;
        refused(&answer)?;
        if options.json {
            println!("{}", serde_json::to_string_pretty(&answer)?);
        } else {
            print!("{}", render::status(&answer));
        }
        return Ok(verdict(&[answer]));
    }
    let mut answers = Vec::new();
    let mut failed = None;
    for Answered { socket, answer } in daemons::ask_all(&options, "/v1/status").await? {
        match answer {
            Ok(status) => answers.push((socket, narrowed(status, &options))),
            Err(error) => {
                eprintln!("romulus: {error:#}");
                failed = Some(error);
            }
        }
    }
    answers.retain(|(_, status)| options.vm().is_none() || !daemons::vms(status).is_empty());
    if let (true, Some(error)) = (answers.is_empty(), failed) {
        return Err(error);
    }
    if let (true, Some(vm)) = (answers.is_empty(), options.vm()) {
        bail!("no daemon on this host has {vm}");
    }
    if options.json {
        let one = |(socket, status): &(PathBuf, Value)| json!({"socket": socket, "status": status});
        let all: Vec<Value> = answers.iter().map(one).collect();
        println!(
            "{}",
            serde_json::to_string_pretty(&json!({"schema": SCHEMA, "daemons": all}))?
        );
    } else {
        let texts: Vec<String> = answers.iter().map(|(_, status)| render::status(status)).collect();
        print!("{}", texts.join("\n"));
    }
    let statuses: Vec<Value> = answers.into_iter().map(|(_, status)| status).collect();
    Ok(verdict(&statuses))
}

/// An agent's status with the wanted VM alone.
fn narrowed(mut status: Value, options: &AdminOptions) -> Value {
    if let Some(vms) = status["vms"].as_array_mut() {
        vms.retain(|vm| daemons::is_wanted(vm, options.vm()));
    } else if !daemons::is_wanted(&status, options.vm()) {
        return json!({});
    }
    status
}

/// Protected only when each VM is, and there is one. A witness says nothing about that.
fn verdict(statuses: &[Value]) -> u8 {
    let mut of_vms = statuses
        .iter()
        .filter(|status| status["role"] != "witness")
        .peekable();
    if of_vms.peek().is_none() || of_vms.all(render::is_protected) {
        exit::OK
    } else {
        exit::NOT_PROTECTED
    }
}

/// A daemon's refusal as an error.
fn refused(answer: &Value) -> anyhow::Result<()> {
    match answer["error"].as_str() {
        Some(error) => bail!("{error}"),
        None => Ok(()),
    }
}

/// `romulus events`.
pub(crate) async fn events(options: EventsOptions) -> anyhow::Result<u8> {
    let mut seen = Seen::default();
    loop {
        let mut new = Vec::new();
        for Answered { socket, answer } in
            daemons::ask_all(&options.admin, &route(&options.admin, "events")).await?
        {
            match answer {
                Ok(answer) => new.extend(seen.new_ones(&socket, &answer)),
                // A daemon that ends while its events are followed is no reason to stop.
                Err(error) if !options.follow => return Err(error),
                Err(_) => {}
            }
        }
        new.retain(|event| daemons::is_wanted(event, options.admin.vm()));
        new.sort_by_key(|event| event["unix_us"].as_u64());
        print_events(&options, &new)?;
        if !options.follow {
            return Ok(exit::OK);
        }
        tokio::time::sleep(FOLLOW_INTERVAL).await;
    }
}

fn print_events(options: &EventsOptions, events: &[Value]) -> anyhow::Result<()> {
    match (options.admin.json, options.follow) {
        (true, true) => {
            for event in events {
                println!("{event}");
            }
        }
        (true, false) => println!(
            "{}",
            serde_json::to_string_pretty(&json!({"schema": SCHEMA, "events": events}))?
        ),
        (false, _) => print!("{}", render::events(events)),
    }
    Ok(())
}

/// What was printed of each daemon's list, which loses its oldest as it gets new ones.
#[derive(Default)]
struct Seen(HashMap<PathBuf, (u64, Vec<Value>)>);

impl Seen {
    /// The events that were not there before, each with its VM.
    fn new_ones(&mut self, socket: &Path, answer: &Value) -> Vec<Value> {
        let (latest, at_latest) = self.0.entry(socket.to_owned()).or_default();
        let mut new = Vec::new();
        for event in answer["events"].as_array().into_iter().flatten() {
            let mut event = event.clone();
            if event["vm"].is_null() {
                event["vm"] = answer["vm"].clone();
            }
            let at = event["unix_us"].as_u64().unwrap_or(0);
            if at < *latest || at_latest.contains(&event) {
                continue;
            }
            if at > *latest {
                (*latest, *at_latest) = (at, Vec::new());
            }
            at_latest.push(event.clone());
            new.push(event);
        }
        new
    }
}

/// `romulus failover`.
pub(crate) async fn failover(options: FailoverOptions) -> anyhow::Result<u8> {
    let mut flags = Vec::new();
    if options.force {
        flags.push("force=true");
    }
    if options.fenced {
        flags.push("fenced=true");
    }
    // Only an agent knows force.
    let roles: &[&str] = if options.force {
        &["backup"]
    } else {
        &["primary", "backup"]
    };
    order(options.admin, "failover", roles, &flags).await
}

/// `romulus forget`. The VM is named even where there is one only: what is removed does not come back.
pub(crate) async fn forget(options: ForgetOptions) -> anyhow::Result<u8> {
    if options.admin.vm().is_none() {
        bail!("name the VM that is to be forgotten");
    }
    let flags: &[&str] = if options.force { &["force=true"] } else { &[] };
    order(options.admin, "forget", &["backup"], flags).await
}

/// `romulus unprotect`, `failover` and `forget`, for the first of `roles` that is there.
pub(crate) async fn order(
    options: AdminOptions,
    verb: &str,
    roles: &[&str],
    flags: &[&str],
) -> anyhow::Result<u8> {
    let socket = daemons::for_order(&options, roles).await?;
    let mut path = route(&options, verb);
    for flag in flags {
        path.push(if path.contains('?') { '&' } else { '?' });
        path.push_str(flag);
    }
    let answer = daemons::post(&socket, &path).await?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&answer)?);
    } else {
        refused(&answer)?;
        let under_way = answer["next"]
            .as_str()
            .unwrap_or("under way; see `romulus status`");
        let how = if answer["done"] == true { "done" } else { under_way };
        println!("{verb}: {how}");
    }
    Ok(if answer["error"].is_null() {
        exit::OK
    } else {
        exit::FAILED
    })
}

fn route(options: &AdminOptions, what: &str) -> String {
    match options.vm() {
        Some(vm) if options.admin.is_some() || what != "events" => format!("/v1/{what}?vm={vm}"),
        _ => format!("/v1/{what}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_that_are_followed_are_each_shown_once_though_times_repeat_and_old_ones_go() {
        let event = |at: u64, name: &str| json!({"event": name, "unix_us": at, "detail": {}});
        let answer = |events: &[Value]| json!({"vm": "web", "events": events});
        let names = |events: Vec<Value>| -> Vec<String> {
            let name = |event: &Value| event["event"].as_str().unwrap().to_owned();
            assert!(events.iter().all(|event| event["vm"] == "web"));
            events.iter().map(name).collect()
        };
        let mut seen = Seen::default();
        let mut see = |events: &[Value]| names(seen.new_ones(Path::new("/a"), &answer(events)));
        let (a, b, c, d) = (event(1, "a"), event(2, "b"), event(2, "c"), event(3, "d"));
        assert_eq!(see(&[a.clone(), b.clone()]), ["a", "b"]);
        assert_eq!(see(&[a.clone(), b.clone(), c.clone()]), ["c"]);
        assert!(see(&[b.clone(), c.clone()]).is_empty());
        assert_eq!(see(&[b, c, d.clone()]), ["d"]);
        assert_eq!(seen.new_ones(Path::new("/other"), &answer(&[a])).len(), 1);
    }

    #[test]
    fn several_daemons_are_protected_when_every_vm_is_and_a_witness_does_not_count() {
        let good = json!({"role": "primary", "vm": "a", "state": "protected"});
        let bad = json!({"role": "backup", "vms": [{"state": "not_protected"}]});
        let witness = json!({"role": "witness", "vms": 3});
        assert_eq!(verdict(&[good.clone(), witness.clone()]), exit::OK);
        assert_eq!(verdict(&[good, bad]), exit::NOT_PROTECTED);
        assert_eq!(verdict(&[witness]), exit::OK);
    }
}
