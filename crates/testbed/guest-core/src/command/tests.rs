use super::*;
use crate::resp;
use proptest::prelude::*;

#[derive(Default)]
struct Fake {
    dirtying: Option<Dirtying>,
}

impl Machine for Fake {
    fn clock(&mut self) -> (u64, u64) {
        (5, 10)
    }
    fn self_check(&mut self, why: &mut dyn Write) -> bool {
        let _ = why.write_str("vCPU 1 stands still\n");
        self.dirtying.is_none()
    }
    fn report(&mut self, into: &mut dyn Write) -> fmt::Result {
        write!(into, "rounds:5\r\n")
    }
    fn connection(&self) -> u64 {
        77
    }
    fn dirtying(&mut self) -> Option<Dirtying> {
        self.dirtying
    }
    fn set_dirtying(&mut self, dirtying: Option<Dirtying>) {
        self.dirtying = dirtying;
    }
    fn damage(&mut self, what: &str) -> bool {
        what == "byte"
    }
}

/// Gives `lines` to a fresh service of `arena_bytes`; what it replies, and what it then does.
fn talk_in(arena_bytes: usize, lines: &str) -> (String, Then) {
    let mut arena = vec![0; arena_bytes];
    let mut store = Store::new(&mut arena);
    let mut machine = Fake::default();
    let mut buffer = vec![0; 8192];
    let (mut length, mut then, mut input) = (0, Then::Next, lines.as_bytes());
    while let Some(request) = resp::parse(input).unwrap() {
        let mut reply = Reply::new(&mut buffer, length);
        then = execute(request.args.words(), &mut store, &mut machine, &mut reply);
        length = reply.finish();
        input = &input[request.bytes..];
    }
    (String::from_utf8(buffer[..length].to_vec()).unwrap(), then)
}

fn talk(lines: &str) -> String {
    talk_in(1 << 16, lines).0
}

#[test]
fn what_is_set_is_got() {
    assert_eq!(talk("SET k v\nGET k\nget nothing\n"), "+OK\r\n$1\r\nv\r\n$-1\r\n");
    assert_eq!(
        talk("MSET a 1 b 2\nMGET a b c\nDBSIZE\n"),
        "+OK\r\n*3\r\n$1\r\n1\r\n$1\r\n2\r\n$-1\r\n:2\r\n"
    );
    assert_eq!(
        talk("SET a 1\nEXISTS a a b\nDEL a b\nFLUSHALL\nDBSIZE\n"),
        "+OK\r\n:2\r\n:1\r\n+OK\r\n:0\r\n"
    );
    assert_eq!(
        talk("APPEND a xy\nAPPEND a z\nSTRLEN a\nGETDEL a\nGETDEL a\n"),
        ":2\r\n:3\r\n:3\r\n$3\r\nxyz\r\n$-1\r\n"
    );
}

#[test]
fn conditions_of_a_set_are_kept() {
    assert_eq!(
        talk("SETNX a 1\nSETNX a 2\nGETSET a 3\nGET a\n"),
        ":1\r\n:0\r\n$1\r\n1\r\n$1\r\n3\r\n"
    );
    assert_eq!(
        talk("SET a 1 XX\nSET a 1 NX\nSET a 2 NX\nGET a\n"),
        "$-1\r\n+OK\r\n$-1\r\n$1\r\n1\r\n"
    );
    assert_eq!(
        talk("SET a 1 GET\nSET a 2 XX GET\nGET a\n"),
        "$-1\r\n$1\r\n1\r\n$1\r\n2\r\n"
    );
    assert!(talk("SET a 1 EX 5\n").starts_with("-ERR syntax error"));
}

#[test]
fn numbers_count_and_do_not_overflow() {
    assert_eq!(
        talk("INCR n\nINCRBY n 41\nDECRBY n 2\nDECR n\nGET n\n"),
        ":1\r\n:42\r\n:40\r\n:39\r\n$2\r\n39\r\n"
    );
    let error = "-ERR value is not an integer or out of range\r\n";
    assert_eq!(
        talk("SET n 9223372036854775807\nINCR n\nDECRBY n -9223372036854775808\n"),
        format!("+OK\r\n{error}{error}")
    );
    assert_eq!(
        talk("SET n x\nINCR n\nINCRBY n 1.5\n"),
        format!("+OK\r\n{error}{error}")
    );
}

#[test]
fn a_full_store_says_so_and_keeps_what_it_has() {
    let long = "x".repeat(3000);
    let (replies, _) = talk_in(
        4096,
        &format!("SET a 1\nGETSET a {long}\nGET a\nAPPEND a {long}\nMSET b {long} c 1\nGET a\n"),
    );
    let full = "-OOM no memory is left for keys\r\n";
    assert_eq!(
        replies,
        format!("+OK\r\n{full}$1\r\n1\r\n{full}{full}$1\r\n1\r\n")
    );
}

#[test]
fn what_is_not_known_is_named() {
    assert_eq!(
        talk("NOSUCH a\nGET\nMSET a\n\n"),
        "-ERR unknown command 'NOSUCH'\r\n-ERR wrong number of arguments for 'GET' command\r\n-ERR wrong number of arguments for 'MSET' command\r\n"
    );
}

#[test]
fn the_clients_of_redis_get_what_they_ask_first() {
    assert_eq!(
        talk("CONFIG GET save\nCOMMAND DOCS\nCLIENT SETINFO a b\nSELECT 0\n"),
        "*2\r\n$4\r\nsave\r\n$0\r\n\r\n*0\r\n+OK\r\n+OK\r\n"
    );
    assert_eq!(talk("PING\nPING x\nECHO y\n"), "+PONG\r\n$1\r\nx\r\n$1\r\ny\r\n");
    assert!(talk("INFO\n").contains("rounds:5"));
}

#[test]
fn the_guests_own_commands_reach_the_machine() {
    assert_eq!(
        talk("CLOCK\nDAMAGE byte\nSELFCHECK\n"),
        "*2\r\n:5\r\n:10\r\n+OK\r\n+OK\r\n"
    );
    assert!(talk("DIRTY random:1:1\nSELFCHECK\n").ends_with("-SELFCHECK vCPU 1 stands still.\r\n"));
    assert_eq!(talk("CLIENT ID\n"), ":77\r\n");
    assert!(talk("DAMAGE peace\n").starts_with("-ERR"));
    assert_eq!(
        talk("DIRTY\nDIRTY random/text:10:25\nDIRTY off\n"),
        "$3\r\noff\r\n$17\r\nrandom/text:10:25\r\n$3\r\noff\r\n"
    );
    assert!(talk("DIRTY all\n").starts_with("-ERR the pattern is one of"));
    let last = |line| talk_in(4096, line).1;
    assert_eq!(
        [
            last("QUIT\n"),
            last("SHUTDOWN\n"),
            last("REBOOT\n"),
            last("CRASH\n")
        ],
        [Then::Close, Then::PowerOff, Then::Reset, Then::Crash]
    );
}

/// Takes one whole reply off the front of `bytes`.
fn take_reply(bytes: &[u8]) -> Option<&[u8]> {
    let end = bytes.windows(2).position(|pair| pair == b"\r\n")?;
    let (line, rest) = (&bytes[..end], &bytes[end + 2..]);
    let number = || std::str::from_utf8(&line[1..]).ok()?.parse::<i64>().ok();
    match line.first()? {
        b'+' | b'-' => Some(rest),
        b':' => number().map(|_| rest),
        b'$' => match usize::try_from(number()?) {
            Ok(length) => rest.get(length..)?.strip_prefix(b"\r\n"),
            Err(_) => Some(rest),
        },
        b'*' => (0..number()?).try_fold(rest, |rest, _| take_reply(rest)),
        _ => None,
    }
}

proptest! {
    #[test]
    fn every_request_gets_one_whole_reply_whatever_it_says(
        requests in proptest::collection::vec(
            (0..COMMANDS.len(), proptest::collection::vec("[ -~\r\n]{0,40}|a|b|NX|GET|9223372036854775807", 0..6)), 1..60),
        arena_kib in 4..9_usize, room in 100..3000_usize,
    ) {
        let (mut arena, mut buffer) = (vec![0; arena_kib << 10], vec![0; room]);
        let (mut store, mut machine) = (Store::new(&mut arena), Fake::default());
        for (command, args) in requests {
            let mut words = vec![COMMANDS[command].name];
            words.extend(args.iter().map(String::as_bytes));
            let mut reply = Reply::new(&mut buffer, 0);
            execute(&words, &mut store, &mut machine, &mut reply);
            let length = reply.finish();
            prop_assert_eq!(take_reply(&buffer[..length]), Some(b"".as_slice()), "{:?}", words);
        }
    }
}
