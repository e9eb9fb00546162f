//! One trial: arm, strike, and see that the right host goes on with everything there.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde_json::Value;

use super::watch::{go_on, kill_with, wait_fails, wait_struck};
use super::{Blow, Outcome, Part, Trial, When};
use crate::daemons::{AgentConfig, Fault, ProtectConfig};
use crate::stage::{Stage, StageConfig};
use crate::{Host, Process, Stamp, wait_for};

/// A daemon on its way to protection may wait for a busy machine.
const STRUCK_AT_MOST: Duration = Duration::from_secs(90);
/// A bootstrap may hold the guest for five times the kill limit of one second; the rest is margin for a busy machine.
const FREED_AT_MOST: Duration = Duration::from_secs(15);
const SOON: Duration = Duration::from_secs(90);
/// How long a daemon that is stopped is left so.
const STOPPED_FOR: Duration = Duration::from_secs(2);

/// Carries a trial out; whether the guest is still on the primary and of use for another.
pub(super) fn run(
    stage: &mut Stage,
    config: &StageConfig,
    trial: Trial,
    outcome: &mut Outcome,
) -> Result<bool> {
    let begun = Stamp::now();
    let struck = strike(stage, config, trial)?;
    let moved = wait_decided(stage, config, trial)?;
    outcome.went_on = if moved { "backup" } else { "primary" }.to_owned();
    if moved {
        went_to_backup(stage, trial, struck, outcome)?;
    } else {
        stayed(stage, config, trial, begun)?;
    }
    // Before the client ends: it may have to speak through a gate.
    let client = stage.finish_client()?;
    outcome.acked_writes = client.acked;
    outcome.lost_acked_writes = client.lost;
    outcome.connection_resets = client.resets;
    ensure!(
        (client.lost, client.resets, client.refused) == (0, 0, 0),
        "{} acknowledged writes lost, {} connections broken, {} writes refused: {}",
        client.lost,
        client.resets,
        client.refused,
        client.trouble.unwrap_or_default()
    );
    if !moved {
        leave(stage)?;
        stage.start_client(config.client)?;
    }
    let audit = stage.audit();
    outcome.gated_frames = audit.gated_frames;
    outcome.uncommitted_frames = audit.uncommitted_frames;
    ensure!(
        audit.uncommitted_frames == 0,
        "{} frames left before their epoch was committed, the first one {:?} (sent, left)",
        audit.uncommitted_frames,
        audit.first_uncommitted
    );
    Ok(!moved)
}

/// Brings the daemons to the point; returns a moment before which nothing that follows from it happened.
fn strike(stage: &mut Stage, config: &StageConfig, trial: Trial) -> Result<Stamp> {
    let trigger = stage.lab.run_path("fault-from");
    // Left by the trial before, or not there.
    let _ = std::fs::remove_file(&trigger);
    let action = if trial.blow == Blow::Stop {
        "sigstop"
    } else {
        "sigkill"
    };
    let fault = Fault {
        place: match trial.part {
            Part::Witness => format!("{}:{action}", trial.point),
            _ => format!("{}@{}:{action}", trial.point, trial.pass),
        },
        from: (trial.when != When::Starting).then(|| trigger.clone()),
    };
    if trial.part == Part::Agent {
        stage.start_agent(&AgentConfig {
            fault: Some(fault.clone()),
            ..config.agent.clone()
        })?;
    }
    let starting = trial.when == When::Starting;
    if trial.part == Part::Witness && starting {
        restart_witness(stage, Some(&fault))?;
    }
    let begun = Stamp::now();
    start_replicator(stage, (trial.part == Part::Replicator).then(|| fault.clone()))?;
    if starting {
        wait_struck(part(stage, trial.part)?, trial.point, trial.blow, STRUCK_AT_MOST)?;
        return Ok(begun);
    }
    wait_protected(stage)?;
    // Any moment of an epoch, and not the first ones.
    sleep(Duration::from_millis(300 + Stamp::now().micros() % 40));
    let guest = stage.guest.pid()?;
    let both = (trial.blow == Blow::HostDies)
        .then(|| kill_with(part(stage, Part::Replicator)?, guest))
        .transpose()?;
    let armed = Stamp::now();
    if trial.part == Part::Witness {
        restart_witness(stage, Some(&fault))?;
    } else {
        std::fs::write(&trigger, "").context("cannot make the trigger")?;
    }
    provoke(stage, trial.when)?;
    wait_struck(part(stage, trial.part)?, trial.point, trial.blow, STRUCK_AT_MOST)?;
    if let Some(both) = both {
        both.join()
            .map_err(|_| anyhow!("the watch over the replicator panicked"))?;
        stage.guest.process_mut().wait(Duration::from_secs(5))?;
    }
    Ok(armed)
}

/// What leads to the phase.
fn provoke(stage: &mut Stage, when: When) -> Result<()> {
    let order = match when {
        When::Starting | When::Protected => return Ok(()),
        When::TakingOver => return stage.kill_primary().map(drop),
        When::BackupLost => {
            part(stage, Part::Agent)?.kill();
            return Ok(());
        }
        When::Leaving => "unprotect",
        When::Moving => "failover",
    };
    // It waits for an end that does not come: let it be answered by nobody.
    let argv = stage.lab.romulus_argv(Host::Primary, &[order])?;
    stage
        .orders
        .push(stage.lab.spawn(Host::Primary, "romulus", &argv)?);
    Ok(())
}

/// Waits until the record names one host, reviving who is needed for that; whether it is the backup.
fn wait_decided(stage: &mut Stage, config: &StageConfig, trial: Trial) -> Result<bool> {
    if trial.part == Part::Witness {
        sleep(STOPPED_FOR);
        revive(stage, config, trial)?;
        if trial.when == When::Starting {
            return Ok(false);
        }
    }
    if trial.part == Part::Agent && trial.when == When::TakingOver {
        sleep(STOPPED_FOR);
        revive(stage, config, trial)?;
    }
    if trial.when == When::BackupLost {
        sleep(STOPPED_FOR);
        if named(stage)?.is_none() {
            // With both hosts' daemons gone nobody asks; whoever comes back first does.
            stage.start_agent(&config.agent)?;
        }
    }
    wait_for("the record to name one host", SOON, || named(stage).transpose())?
        .map(|host| host == Host::Backup)
}

/// The host that the record names alone; the primary when there is no record, none while it names a pair.
fn named(stage: &Stage) -> Result<Option<Host>> {
    let record = stage.lab.record()?;
    let mode = record.get("mode").unwrap_or(&Value::Null);
    if mode.get("paired").is_some() {
        return Ok(None);
    }
    let host = mode.pointer("/alone/host").and_then(Value::as_str);
    Ok(Some(if host == Some(Host::Backup.name()) {
        Host::Backup
    } else {
        Host::Primary
    }))
}

fn went_to_backup(stage: &mut Stage, trial: Trial, struck: Stamp, outcome: &mut Outcome) -> Result<()> {
    // An agent that dies once the guest runs has not said so: then the guest itself does.
    let unsaid = trial.blow == Blow::Kill && ["standby.running", "agent.activated"].contains(&trial.point);
    let activated_at = wait_for("the activation", SOON, || {
        let said = stage.timeline.first("activated", struck).map(|event| event.at);
        let speaks = || stage.from_backup.first_guest_frame(struck).map(|frame| frame.at);
        said.or_else(|| unsaid.then(speaks).flatten())
    })?;
    let old_guest_lives = stage.guest.process_mut().ended().is_none();
    if old_guest_lives {
        wait_runs(stage).context("the old guest is left paused")?;
    }
    stage.wait_ack_after(activated_at, SOON)?;
    // At that point the comparison is done, and not logged yet.
    let verified = unsaid || stage.timeline.first("activation_verified", struck).is_some();
    outcome.memory_verified = Some(verified);
    ensure!(verified, "the restored memory was not compared");
    if old_guest_lives {
        // It wakes up, or starts again, in a world that has moved on. One that holds a guest is killed by its timer meanwhile.
        let fenced = trial.blow == Blow::Stop
            && go_on(part(stage, Part::Replicator)?)?
            && wait_fails(part(stage, Part::Replicator)?, SOON)?;
        if !fenced {
            start_replicator(stage, None)?;
            let fails = wait_fails(part(stage, Part::Replicator)?, SOON)
                .context("the old primary did not end when another host spoke for its VM")?;
            ensure!(fails, "the old primary was killed");
        }
        let runs = stage.guest.runs(&stage.lab)?;
        ensure!(!runs, "the old guest was not stopped");
    }
    sleep(Duration::from_millis(500));
    let speaks = stage
        .from_backup
        .first_guest_frame(struck)
        .ok_or_else(|| anyhow!("the guest did not speak on the backup"))?;
    // A replicator that was stopped on its way to a release makes it when it goes on. What leaves then was committed,
    // which the audit judges; all the rest it has to drop.
    outcome.late_frames = stage.from_primary.count_after(speaks.at);
    let may_be_late = trial.blow == Blow::Stop && trial.point == "replicator.before_release";
    ensure!(
        outcome.late_frames == 0 || may_be_late,
        "{} frames came from the old primary after the guest spoke on the backup",
        outcome.late_frames
    );
    Ok(())
}

fn stayed(stage: &mut Stage, config: &StageConfig, trial: Trial, begun: Stamp) -> Result<()> {
    ensure!(trial.blow != Blow::HostDies, "the host died and nobody took over");
    wait_runs(stage).context("the guest is left paused")?;
    if trial.part != Part::Witness {
        sleep(if trial.blow == Blow::Stop {
            STOPPED_FOR
        } else {
            Duration::ZERO
        });
        revive(stage, config, trial)?;
    }
    if trial.when == When::BackupLost {
        stage.start_agent(&config.agent)?;
    }
    let ended = part(stage, Part::Replicator)?.ended().is_some();
    if ended || trial.when == When::Leaving {
        // It was told to leave and may just be on its way.
        part(stage, Part::Replicator)?.wait(SOON)?;
        start_replicator(stage, None)?;
    }
    wait_protected(stage).context("it can't be protected again")?;
    stage.wait_ack_after(Stamp::now(), SOON)?;
    wait_runs(stage)?;
    ensure!(
        stage.timeline.first("activated", begun).is_none(),
        "the backup took over"
    );
    let others = stage.from_backup.count_after(begun);
    ensure!(
        others == 0,
        "{others} frames came from the backup while the guest was on the primary"
    );
    Ok(())
}

/// Brings a daemon that was struck back.
fn revive(stage: &mut Stage, config: &StageConfig, trial: Trial) -> Result<()> {
    if trial.blow == Blow::Stop && go_on(part(stage, trial.part)?)? {
        return Ok(());
    }
    match trial.part {
        // Started again where it is needed.
        Part::Replicator => Ok(()),
        Part::Agent => stage.start_agent(&config.agent),
        Part::Witness => restart_witness(stage, None),
    }
}

/// Ends the protection, so that the next trial begins afresh.
fn leave(stage: &mut Stage) -> Result<()> {
    stage.lab.romulus(Host::Primary, &["unprotect"])?;
    let replicator = part(stage, Part::Replicator)?;
    let status = replicator.wait(SOON)?;
    ensure!(status.success(), "unprotect: {}", replicator.tail());
    Ok(())
}

fn wait_runs(stage: &Stage) -> Result<()> {
    // A checkpoint may be under way, and QEMU's monitor busy with it; one that nobody ends must not stay.
    wait_for("the guest to run", FREED_AT_MOST, || {
        stage.guest.runs(&stage.lab).is_ok_and(|runs| runs).then_some(())
    })
}

fn wait_protected(stage: &mut Stage) -> Result<()> {
    let replicator = stage
        .replicator
        .as_mut()
        .ok_or_else(|| anyhow!("there is no replicator"))?;
    stage.lab.wait_protected(replicator, SOON).map(drop)
}

fn start_replicator(stage: &mut Stage, fault: Option<Fault>) -> Result<()> {
    // One that a trial left stopped goes first.
    drop(stage.replicator.take());
    let replicator = stage.lab.start_replicator(&ProtectConfig {
        fault,
        extra: super::patience(),
        ..ProtectConfig::default()
    })?;
    stage.timeline.follow("primary", replicator.log());
    stage.replicator = Some(replicator);
    Ok(())
}

fn restart_witness(stage: &mut Stage, fault: Option<&Fault>) -> Result<()> {
    drop(stage.witness.take());
    stage.witness = Some(stage.lab.start_witness_with(fault)?);
    Ok(())
}

fn part(stage: &mut Stage, part: Part) -> Result<&mut Process> {
    let process = match part {
        Part::Replicator => &mut stage.replicator,
        Part::Agent => &mut stage.agent,
        Part::Witness => &mut stage.witness,
    };
    let Some(process) = process else {
        bail!("there is no {part:?}")
    };
    Ok(process)
}
