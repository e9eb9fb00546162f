//! The commands of the key-value service: what `redis-cli` and `redis-benchmark` use, and a few of the guest's own.
//!
//! The guest's own: `SELFCHECK` (whether everything is right; `INFO` tells more), `CLOCK` (kvmclock in nanoseconds, time stamp counter),
//! `DIRTY [WORD]` (the dirtier's settings, or new ones), `DAMAGE WHAT` (spoils something, so that a test sees the
//! self-checks find it), `SHUTDOWN`, `REBOOT`, `CRASH` (power off, reset, panic).

use core::fmt::{self, Write};

use crate::dirty::Dirtying;
use crate::reply::{Reply, Text};
use crate::resp::integer;
use crate::store::Store;

/// What the commands want of the machine that they run on.
pub trait Machine {
    /// kvmclock in nanoseconds, and the time stamp counter at the same moment.
    fn clock(&mut self) -> (u64, u64);
    /// Says whether everything is right; if not, writes what is wrong into `why`.
    fn self_check(&mut self, why: &mut dyn Write) -> bool;
    /// Writes what the machine does: lines of the form `name:value`.
    ///
    /// # Errors
    /// Those of `into`.
    fn report(&mut self, into: &mut dyn Write) -> fmt::Result;
    /// Number of the connection that the command came by: no other ever has it.
    fn connection(&self) -> u64;
    /// What the dirtier does.
    fn dirtying(&mut self) -> Option<Dirtying>;
    /// Tells the dirtier what to do.
    fn set_dirtying(&mut self, dirtying: Option<Dirtying>);
    /// Spoils what `what` names, so that a self-check must find it; says whether it knows such a thing.
    fn damage(&mut self, what: &str) -> bool;
}

/// What to do when a command's reply has been sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// Read the next command.
    Next,
    /// Close the connection.
    Close,
    /// Power the machine off.
    PowerOff,
    /// Reset the machine.
    Reset,
    /// Panic.
    Crash,
}

/// Carries out one request, whose words are `words`, and writes its reply.
pub fn execute(
    words: &[&[u8]],
    store: &mut Store<'_>,
    machine: &mut dyn Machine,
    reply: &mut Reply<'_>,
) -> Then {
    let Some((&name, args)) = words.split_first() else {
        return Then::Next;
    };
    let Some(command) = COMMANDS
        .iter()
        .find(|command| name.eq_ignore_ascii_case(command.name))
    else {
        reply.error(format_args!("ERR unknown command '{}'", Printable(name)));
        return Then::Next;
    };
    if args.len() < command.args_min || args.len() > command.args_max {
        reply.error(format_args!(
            "ERR wrong number of arguments for '{}' command",
            Printable(name)
        ));
        return Then::Next;
    }
    (command.run)(&mut Call {
        args,
        store,
        machine,
        reply,
    })
}

/// One command that is being carried out.
struct Call<'c, 's, 'r> {
    args: &'c [&'c [u8]],
    store: &'c mut Store<'s>,
    machine: &'c mut dyn Machine,
    reply: &'c mut Reply<'r>,
}

struct Command {
    name: &'static [u8],
    args_min: usize,
    args_max: usize,
    run: fn(&mut Call<'_, '_, '_>) -> Then,
}

const fn command(
    name: &'static [u8],
    args_min: usize,
    args_max: usize,
    run: fn(&mut Call<'_, '_, '_>) -> Then,
) -> Command {
    Command {
        name,
        args_min,
        args_max,
        run,
    }
}

const ANY: usize = usize::MAX;
const COMMANDS: &[Command] = &[
    command(b"GET", 1, 1, get),
    command(b"SET", 2, 5, set),
    command(b"PING", 0, 1, ping),
    command(b"INCR", 1, 1, incr),
    command(b"MSET", 2, ANY, mset),
    command(b"MGET", 1, ANY, mget),
    command(b"DEL", 1, ANY, del),
    command(b"UNLINK", 1, ANY, del),
    command(b"EXISTS", 1, ANY, exists),
    command(b"INCRBY", 2, 2, incrby),
    command(b"DECR", 1, 1, decr),
    command(b"DECRBY", 2, 2, decrby),
    command(b"APPEND", 2, 2, append),
    command(b"STRLEN", 1, 1, strlen),
    command(b"GETSET", 2, 2, getset),
    command(b"GETDEL", 1, 1, getdel),
    command(b"SETNX", 2, 2, setnx),
    command(b"DBSIZE", 0, 0, dbsize),
    command(b"FLUSHALL", 0, 1, flush),
    command(b"FLUSHDB", 0, 1, flush),
    command(b"ECHO", 1, 1, echo),
    command(b"SELECT", 1, 1, select),
    command(b"CONFIG", 1, ANY, config),
    command(b"CLIENT", 1, ANY, client),
    command(b"COMMAND", 0, ANY, commands),
    command(b"INFO", 0, ANY, info),
    command(b"QUIT", 0, 0, quit),
    command(b"SELFCHECK", 0, 0, self_check),
    command(b"CLOCK", 0, 0, clock),
    command(b"DIRTY", 0, 1, dirty),
    command(b"DAMAGE", 1, 1, damage),
    command(b"SHUTDOWN", 0, ANY, shutdown),
    command(b"REBOOT", 0, 0, reboot),
    command(b"CRASH", 0, 0, crash),
];

/// Longest list of lines that a command replies with, in bytes.
const INFO_BYTES: usize = 2048;

fn ok(call: &mut Call<'_, '_, '_>) -> Then {
    call.reply.simple("OK");
    Then::Next
}

fn number(call: &mut Call<'_, '_, '_>, number: usize) -> Then {
    call.reply.integer(i64::try_from(number).unwrap_or(i64::MAX));
    Then::Next
}

/// Replies what storing gave: what `stored` writes, or that no memory is left.
fn stored<T, E: fmt::Display>(
    call: &mut Call<'_, '_, '_>,
    result: Result<T, E>,
    reply: fn(&mut Call<'_, '_, '_>, T) -> Then,
) -> Then {
    match result {
        Ok(value) => reply(call, value),
        Err(full) => {
            call.reply.error(format_args!("OOM {full}"));
            Then::Next
        }
    }
}

fn get(call: &mut Call<'_, '_, '_>) -> Then {
    call.reply.maybe(call.store.get(call.args[0]));
    Then::Next
}

fn set(call: &mut Call<'_, '_, '_>) -> Then {
    let (mut only_new, mut only_old, mut give_old) = (false, false, false);
    for option in &call.args[2..] {
        match option {
            option if option.eq_ignore_ascii_case(b"NX") => only_new = true,
            option if option.eq_ignore_ascii_case(b"XX") => only_old = true,
            option if option.eq_ignore_ascii_case(b"GET") => give_old = true,
            _ => {
                call.reply.error(format_args!(
                    "ERR syntax error: of the options, NX, XX and GET are known"
                ));
                return Then::Next;
            }
        }
    }
    let there = call.store.get(call.args[0]).is_some();
    let wanted = !(only_new && there || only_old && !there);
    if give_old {
        return if wanted { getset(call) } else { get(call) };
    }
    if !wanted {
        call.reply.maybe(None);
        return Then::Next;
    }
    let result = call.store.set(call.args[0], call.args[1]);
    stored(call, result, |call, ()| ok(call))
}

fn ping(call: &mut Call<'_, '_, '_>) -> Then {
    match call.args.first() {
        Some(text) => call.reply.bulk(text),
        None => call.reply.simple("PONG"),
    }
    Then::Next
}

fn echo(call: &mut Call<'_, '_, '_>) -> Then {
    call.reply.bulk(call.args[0]);
    Then::Next
}

fn add(call: &mut Call<'_, '_, '_>, by: Option<i64>) -> Then {
    let old = call.store.get(call.args[0]).map_or(Some(0), integer);
    let Some(sum) = old.zip(by).and_then(|(old, by)| old.checked_add(by)) else {
        call.reply
            .error(format_args!("ERR value is not an integer or out of range"));
        return Then::Next;
    };
    let mut text = Text::<24>::default();
    let _ = write!(text, "{sum}");
    let result = call.store.set(call.args[0], text.bytes()).map(|()| sum);
    stored(call, result, |call, sum| {
        call.reply.integer(sum);
        Then::Next
    })
}

fn incr(call: &mut Call<'_, '_, '_>) -> Then {
    add(call, Some(1))
}

fn decr(call: &mut Call<'_, '_, '_>) -> Then {
    add(call, Some(-1))
}

fn incrby(call: &mut Call<'_, '_, '_>) -> Then {
    add(call, integer(call.args[1]))
}

fn decrby(call: &mut Call<'_, '_, '_>) -> Then {
    add(call, integer(call.args[1]).and_then(i64::checked_neg))
}

fn mset(call: &mut Call<'_, '_, '_>) -> Then {
    let (pairs, rest) = call.args.as_chunks::<2>();
    if !rest.is_empty() {
        call.reply
            .error(format_args!("ERR wrong number of arguments for 'mset' command"));
        return Then::Next;
    }
    let result = pairs
        .iter()
        .try_for_each(|[key, value]| call.store.set(key, value));
    stored(call, result, |call, ()| ok(call))
}

fn mget(call: &mut Call<'_, '_, '_>) -> Then {
    call.reply.array(call.args.len());
    for key in call.args {
        call.reply.maybe(call.store.get(key));
    }
    Then::Next
}

fn del(call: &mut Call<'_, '_, '_>) -> Then {
    let removed = call.args.iter().filter(|key| call.store.remove(key)).count();
    number(call, removed)
}

fn exists(call: &mut Call<'_, '_, '_>) -> Then {
    let there = call
        .args
        .iter()
        .filter(|key| call.store.get(key).is_some())
        .count();
    number(call, there)
}

fn append(call: &mut Call<'_, '_, '_>) -> Then {
    let result = call.store.append(call.args[0], call.args[1]);
    stored(call, result, number)
}

fn strlen(call: &mut Call<'_, '_, '_>) -> Then {
    let length = call.store.get(call.args[0]).map_or(0, <[u8]>::len);
    number(call, length)
}

fn getset(call: &mut Call<'_, '_, '_>) -> Then {
    // The old value must be replied before it is gone, and the reply taken back if there is no room for the new one.
    let mark = call.reply.mark();
    call.reply.maybe(call.store.get(call.args[0]));
    let result = call.store.set(call.args[0], call.args[1]);
    if result.is_err() {
        call.reply.take_back(mark);
    }
    stored(call, result, |_, ()| Then::Next)
}

fn getdel(call: &mut Call<'_, '_, '_>) -> Then {
    call.reply.maybe(call.store.get(call.args[0]));
    call.store.remove(call.args[0]);
    Then::Next
}

fn setnx(call: &mut Call<'_, '_, '_>) -> Then {
    if call.store.get(call.args[0]).is_some() {
        return number(call, 0);
    }
    let result = call.store.set(call.args[0], call.args[1]);
    stored(call, result, |call, ()| number(call, 1))
}

fn dbsize(call: &mut Call<'_, '_, '_>) -> Then {
    let entries = call.store.entries();
    number(call, entries)
}

fn flush(call: &mut Call<'_, '_, '_>) -> Then {
    call.store.clear();
    ok(call)
}

fn select(call: &mut Call<'_, '_, '_>) -> Then {
    if call.args[0] == b"0" {
        return ok(call);
    }
    call.reply.error(format_args!("ERR DB index is out of range"));
    Then::Next
}

fn config(call: &mut Call<'_, '_, '_>) -> Then {
    match call.args {
        // redis-benchmark asks for two settings before it starts; their values do not matter to it.
        [verb, name] if verb.eq_ignore_ascii_case(b"GET") => {
            call.reply.array(2);
            call.reply.bulk(name);
            call.reply.bulk(b"");
            Then::Next
        }
        [verb] if verb.eq_ignore_ascii_case(b"RESETSTAT") => ok(call),
        _ => {
            call.reply.error(format_args!("ERR nothing can be set here"));
            Then::Next
        }
    }
}

fn client(call: &mut Call<'_, '_, '_>) -> Then {
    match call.args[0] {
        verb if verb.eq_ignore_ascii_case(b"GETNAME") => call.reply.maybe(None),
        verb if verb.eq_ignore_ascii_case(b"ID") => {
            call.reply
                .integer(i64::try_from(call.machine.connection()).unwrap_or(i64::MAX));
        }
        _ => call.reply.simple("OK"),
    }
    Then::Next
}

fn commands(call: &mut Call<'_, '_, '_>) -> Then {
    match call.args {
        [verb] if verb.eq_ignore_ascii_case(b"COUNT") => number(call, COMMANDS.len()),
        _ => {
            call.reply.array(0);
            Then::Next
        }
    }
}

fn info(call: &mut Call<'_, '_, '_>) -> Then {
    let mut text = Text::<INFO_BYTES>::default();
    let entries = call.store.entries();
    let _ = write!(
        text,
        "# Server\r\nredis_version:7.0.0\r\nredis_mode:standalone\r\nromulus_guest:1\r\n"
    );
    let _ = write!(text, "# Keyspace\r\ndb0:keys={entries},expires=0\r\n# Guest\r\n");
    let _ = call.machine.report(&mut text);
    call.reply.bulk(text.bytes());
    Then::Next
}

fn quit(call: &mut Call<'_, '_, '_>) -> Then {
    call.reply.simple("OK");
    Then::Close
}

fn self_check(call: &mut Call<'_, '_, '_>) -> Then {
    let mut why = Text::<128>::default();
    if call.machine.self_check(&mut why) {
        return ok(call);
    }
    call.reply
        .error(format_args!("SELFCHECK {}", Printable(why.bytes())));
    Then::Next
}

fn clock(call: &mut Call<'_, '_, '_>) -> Then {
    let (now_ns, tsc) = call.machine.clock();
    call.reply.array(2);
    for reading in [now_ns, tsc] {
        call.reply.integer(i64::try_from(reading).unwrap_or(i64::MAX));
    }
    Then::Next
}

fn dirty(call: &mut Call<'_, '_, '_>) -> Then {
    if let Some(word) = call.args.first() {
        let parsed = core::str::from_utf8(word)
            .map_err(|_| "text is wanted")
            .and_then(Dirtying::parse);
        match parsed {
            Ok(dirtying) => call.machine.set_dirtying(dirtying),
            Err(why) => {
                call.reply.error(format_args!("ERR {why}"));
                return Then::Next;
            }
        }
    }
    let mut text = Text::<128>::default();
    let _ = match call.machine.dirtying() {
        Some(dirtying) => write!(text, "{dirtying}"),
        None => write!(text, "off"),
    };
    call.reply.bulk(text.bytes());
    Then::Next
}

fn damage(call: &mut Call<'_, '_, '_>) -> Then {
    let known = core::str::from_utf8(call.args[0]).is_ok_and(|what| call.machine.damage(what));
    if known {
        return ok(call);
    }
    call.reply.error(format_args!("ERR this can't be damaged here"));
    Then::Next
}

fn shutdown(call: &mut Call<'_, '_, '_>) -> Then {
    ok(call);
    Then::PowerOff
}

fn reboot(call: &mut Call<'_, '_, '_>) -> Then {
    ok(call);
    Then::Reset
}

fn crash(call: &mut Call<'_, '_, '_>) -> Then {
    ok(call);
    Then::Crash
}

/// Shows at most the first 128 bytes of a text, and only those that print.
struct Printable<'a>(&'a [u8]);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for &byte in self.0.iter().take(128) {
            let shown = if byte.is_ascii_graphic() || byte == b' ' {
                char::from(byte)
            } else {
                '.'
            };
            f.write_char(shown)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
