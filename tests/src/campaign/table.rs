//! The campaign's result, to be read.

use super::Outcome;

/// Prints a line for each failure, and a table of how many trials of each kind went well.
pub fn print(outcomes: &[Outcome]) {
    let mut kinds: Vec<(String, Vec<&Outcome>)> = Vec::new();
    for outcome in outcomes {
        let trial = &outcome.trial;
        let kind = format!(
            "{:<11} {:<12} {:<9}",
            word(trial.part),
            word(trial.when),
            word(trial.blow)
        );
        match kinds.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, of_kind)) => of_kind.push(outcome),
            None => kinds.push((kind, vec![outcome])),
        }
    }
    println!(
        "  {:<11} {:<12} {:<9}  {:>6} {:>6} {:>9} {:>9}  {:>9}",
        "struck", "when", "how", "trials", "ok", "on primary", "on backup", "acked"
    );
    for (kind, of_kind) in &kinds {
        let ok = of_kind.iter().filter(|outcome| outcome.is_ok()).count();
        let on = |host: &str| of_kind.iter().filter(|outcome| outcome.went_on == host).count();
        let acked: u64 = of_kind.iter().map(|outcome| outcome.acked_writes).sum();
        println!(
            "  {kind}  {:>6} {ok:>6} {:>10} {:>9}  {acked:>9}",
            of_kind.len(),
            on("primary"),
            on("backup")
        );
    }
    for outcome in outcomes.iter().filter(|outcome| !outcome.is_ok()) {
        let trial = &outcome.trial;
        println!(
            "  FAILED {} ({}, {}, pass {}): {}",
            trial.point,
            word(trial.when),
            word(trial.blow),
            trial.pass,
            outcome.verdict
        );
        if let Some(logs) = &outcome.logs {
            println!("         {}", logs.display());
        }
    }
}

/// The name of a variant as it stands in the JSON.
fn word(value: impl serde::Serialize) -> String {
    serde_json::to_value(value)
        .ok()
        .and_then(|value| value.as_str().map(str::to_owned))
        .unwrap_or_default()
}
