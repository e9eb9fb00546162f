//! `sqlite3`: transfers between the accounts of a small bank in a file on a tmpfs, each a transaction. A unit is a transfer.
//!
//! Money is only moved, so the sum of all balances has to stay what it was.

use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::process::Command;

use super::{Program, output};

const FILE: &str = "/tmp/bank.db";
const ACCOUNTS: u64 = 10_000;
/// Of each account, at first.
const BALANCE: u64 = 1000;
/// In a round.
const TRANSFERS: u64 = 25;
/// How many of the last transfers are remembered: the file does not grow for ever.
const HISTORY: u64 = 5000;

pub(super) struct Bank {
    transfers: u64,
}

impl Bank {
    pub(super) fn open() -> Result<Self, Box<dyn Error>> {
        let _ = fs::remove_file(FILE);
        ask(&format!(
            "CREATE TABLE accounts(id INTEGER PRIMARY KEY, balance INTEGER, owner TEXT);\n\
             CREATE TABLE history(id INTEGER PRIMARY KEY, payer INTEGER, payee INTEGER, amount INTEGER);\n\
             CREATE INDEX by_payer ON history(payer);\n\
             WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {ACCOUNTS})\n\
             INSERT INTO accounts SELECT i, {BALANCE}, hex(randomblob(40)) FROM n;\n"
        ))?;
        Ok(Self { transfers: 0 })
    }
}

impl Program for Bank {
    fn round(&mut self) -> Result<u64, Box<dyn Error>> {
        let answer = ask(&statements(self.transfers))?;
        if answer.trim() != (ACCOUNTS * BALANCE).to_string() {
            return Err(format!("the accounts hold {:?} together", answer.trim()).into());
        }
        self.transfers += TRANSFERS;
        Ok(TRANSFERS)
    }
}

fn ask(statements: &str) -> Result<String, Box<dyn Error>> {
    output(
        Command::new("sqlite3").args(["-batch", "-bail", FILE]),
        statements,
    )
}

/// The transfers of a round that so many went before, and then the question for the sum.
fn statements(before: u64) -> String {
    let mut text = String::new();
    for number in before..before + TRANSFERS {
        let [payer, payee] = [2 * number, 2 * number + 1].map(|seed| 1 + mixed(seed) % ACCOUNTS);
        let amount = 1 + number % 50;
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "BEGIN;\n\
             UPDATE accounts SET balance = balance - {amount} WHERE id = {payer};\n\
             UPDATE accounts SET balance = balance + {amount} WHERE id = {payee};\n\
             INSERT INTO history VALUES({number}, {payer}, {payee}, {amount});\n\
             DELETE FROM history WHERE id = {number} - {HISTORY};\n\
             COMMIT;"
        );
    }
    text.push_str("SELECT sum(balance) FROM accounts;\n");
    text
}

/// Numbers all over the place (splitmix64; Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
fn mixed(number: u64) -> u64 {
    let mut mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_transfer_takes_what_it_gives_from_accounts_that_there_are() {
        let (first, second) = (statements(0), statements(TRANSFERS));
        assert_ne!(first, second);
        for text in [first, second] {
            let amounts = |sign: &str| -> Vec<&str> {
                let change = format!("balance = balance {sign} ");
                let parts = text.split(&change).skip(1);
                parts.map(|part| part.split(' ').next().unwrap()).collect()
            };
            assert_eq!(amounts("-").len() as u64, TRANSFERS);
            assert_eq!(amounts("-"), amounts("+"));
            let ids = text
                .split("balance")
                .filter_map(|part| part.split_once("WHERE id = "));
            for (_, id) in ids {
                let id: u64 = id.split(';').next().unwrap().parse().unwrap();
                assert!((1..=ACCOUNTS).contains(&id), "{id}");
            }
        }
    }
}
