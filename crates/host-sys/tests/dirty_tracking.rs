//! Dirty tracking of a real other process, end to end: a call made in it, its pages protected, its writes seen.
//!
//! The traced process is this test binary again, in the test named `helper_process`, steered over its stdin.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use romulus_host_sys::{
    CALL_STAGES, CallStage, PageRegion, Pagemap, PidFd, ProcessMemory, SysError, UserFault, call_in_process,
    create_in_process,
};

const PAGES: usize = 600;
const PAGE: usize = 4096;

/// Not a test: the process that the others look at. Commands on stdin: `w N` writes one byte into page N,
/// `r N` lets the kernel write into page N (read(2) of a file into it), `q` quits.
#[test]
fn helper_process() {
    if std::env::var_os("TRACED_HELPER").is_none() {
        return;
    }
    let mut memory = vec![1u8; (PAGES + 1) * PAGE];
    let start = memory.as_ptr().align_offset(PAGE);
    println!("\nbuffer {}", memory.as_ptr() as usize + start);
    let buffer = &mut memory[start..start + PAGES * PAGE];
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap();
        let mut words = line.split(' ');
        let command = words.next().unwrap();
        let page: usize = words.next().map_or(0, |word| word.parse().unwrap());
        match command {
            "w" => buffer[page * PAGE + 7] = buffer[page * PAGE + 7].wrapping_add(1),
            "r" => {
                let mut zero = std::fs::File::open("/dev/zero").unwrap();
                zero.read_exact(&mut buffer[page * PAGE..page * PAGE + 64])
                    .unwrap();
            }
            _ => std::process::exit(if buffer.contains(&2) { 5 } else { 4 }),
        }
        println!("done");
    }
}

/// Not a test: traces the process `TRACER_PID` and kills itself at the stage `TRACER_STAGE`.
#[test]
fn helper_tracer() {
    let Ok(pid) = std::env::var("TRACER_PID") else {
        return;
    };
    let fatal = std::env::var("TRACER_STAGE").unwrap();
    let mut stage = |stage: CallStage| {
        if format!("{stage:?}") == fatal {
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).unwrap();
        }
    };
    call_in_process(pid.parse().unwrap(), libc::SYS_getppid, &[], &mut stage).unwrap();
}

/// Waits until a program that was just started has its C library, and runs.
fn settle(child: &Child) {
    while let Err(SysError::NoGadget(_)) = call_in_process(child.id(), libc::SYS_getpid, &[], &mut |_| {}) {
        std::thread::yield_now();
    }
}

struct Traced {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    buffer: u64,
}

impl Traced {
    fn start() -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["helper_process", "--exact", "--nocapture"])
            .env("TRACED_HELPER", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let buffer = loop {
            let mut line = String::new();
            assert_ne!(output.read_line(&mut line).unwrap(), 0, "the helper ended early");
            if let Some(address) = line.strip_prefix("buffer ") {
                break address.trim().parse().unwrap();
            }
        };
        Self {
            child,
            input,
            output,
            buffer,
        }
    }

    fn say(&mut self, command: &str) {
        writeln!(self.input, "{command}").unwrap();
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert_eq!(line, "done\n");
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn end(&self) -> u64 {
        self.buffer + (PAGES * PAGE) as u64
    }

    fn tracked(&self) -> (UserFault, Pagemap) {
        let fault = create_in_process(self.pid(), &mut |_| {}).unwrap();
        fault.register(self.buffer, (PAGES * PAGE) as u64).unwrap();
        fault.write_protect(self.buffer, (PAGES * PAGE) as u64).unwrap();
        (fault, Pagemap::open(self.pid()).unwrap())
    }

    fn written(&self, pagemap: &mut Pagemap) -> Vec<u64> {
        let mut pages = Vec::new();
        pagemap
            .harvest_written(self.buffer, self.end(), |region| {
                pages.extend(self.pages_of(region));
            })
            .unwrap();
        pages
    }

    fn written_apart(&self, pagemap: &mut Pagemap) -> Vec<u64> {
        let mut pages = Vec::new();
        pagemap
            .harvest_written_apart(self.buffer, self.end(), |region| {
                pages.extend(self.pages_of(region));
            })
            .unwrap();
        pages
    }

    fn pages_of(&self, region: &PageRegion) -> impl Iterator<Item = u64> {
        let start = self.buffer;
        (region.start..region.end)
            .step_by(PAGE)
            .map(move |at| (at - start) / PAGE as u64)
    }

    fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .unwrap()
            .count()
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[test]
fn every_page_written_by_the_process_or_by_the_kernel_is_reported_once() {
    let mut traced = Traced::start();
    let (_fault, mut pagemap) = traced.tracked();
    assert_eq!(traced.written(&mut pagemap), Vec::<u64>::new());
    for page in [3, 4, 5, 77, 599] {
        traced.say(&format!("w {page}"));
    }
    traced.say("r 200");
    assert_eq!(pagemap.count_written(traced.buffer, traced.end()).unwrap(), 6);
    assert_eq!(traced.written(&mut pagemap), [3, 4, 5, 77, 200, 599]);
    assert_eq!(
        traced.written(&mut pagemap),
        Vec::<u64>::new(),
        "a harvest protects again"
    );
    let mut bytes = [0; 8];
    ProcessMemory::new(traced.pid())
        .read(traced.buffer + 77 * PAGE as u64, &mut bytes)
        .unwrap();
    assert_eq!(bytes, [1, 1, 1, 1, 1, 1, 1, 2]);
}

#[test]
fn a_harvest_that_leaves_gaps_out_reports_every_page_once_as_well() {
    let mut traced = Traced::start();
    let (_fault, mut pagemap) = traced.tracked();
    for regions_a_call in [1000, 7, 1] {
        pagemap.limit_regions_a_call(regions_a_call);
        let pages: Vec<u64> = (1..PAGES as u64)
            .filter(|page| page % 40 < 9 && page % 2 == 1)
            .collect();
        for page in &pages {
            traced.say(&format!("w {page}"));
        }
        traced.say("r 200");
        let all: Vec<u64> = pages.iter().copied().chain([200]).collect();
        let mut found = traced.written_apart(&mut pagemap);
        found.sort_unstable();
        let mut expected = all;
        expected.sort_unstable();
        assert_eq!(found, expected, "with {regions_a_call} regions a call");
        assert_eq!(traced.written_apart(&mut pagemap), Vec::<u64>::new());
        assert_eq!(traced.written(&mut pagemap), Vec::<u64>::new());
    }
}

#[test]
fn more_regions_than_fit_one_call_all_arrive() {
    let mut traced = Traced::start();
    let (_fault, mut pagemap) = traced.tracked();
    let odd: Vec<u64> = (1..PAGES as u64).step_by(2).collect();
    for page in &odd {
        traced.say(&format!("w {page}"));
    }
    let mut pages = Vec::new();
    let (start, end) = (traced.buffer, traced.end());
    pagemap.limit_regions_a_call(7);
    pagemap
        .harvest_written(start, end, |region| {
            pages.push((region.start - start) / PAGE as u64)
        })
        .unwrap();
    assert_eq!(pages, odd);
}

#[test]
fn dropping_the_tracker_leaves_nothing_and_it_can_be_made_again() {
    let traced = Traced::start();
    let before = traced.descriptors();
    for _ in 0..3 {
        let (fault, _) = traced.tracked();
        assert_eq!(traced.descriptors(), before, "the process keeps no descriptor");
        let second = create_in_process(traced.pid(), &mut |_| {}).unwrap();
        let busy = second.register(traced.buffer, PAGE as u64).unwrap_err();
        assert_eq!(busy.raw_os_error(), Some(libc::EBUSY), "a range has one tracker");
        drop(fault);
    }
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", traced.pid())).unwrap();
    assert!(
        !smaps
            .lines()
            .any(|line| line.starts_with("VmFlags") && line.contains(" uw")),
        "still registered"
    );
}

#[test]
fn a_process_that_sleeps_in_a_call_sleeps_on_after_it() {
    // sleep(1) waits in a call with its own timeout (restarted by restart_syscall), cat in read(2).
    let mut sleeper = Command::new("sleep").arg("0.4").spawn().unwrap();
    let mut cat = Command::new("cat")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    settle(&sleeper);
    settle(&cat);
    for pid in [sleeper.id(), cat.id()] {
        for _ in 0..5 {
            let parent = call_in_process(pid, libc::SYS_getppid, &[], &mut |_| {}).unwrap();
            assert_eq!(parent, i64::from(std::process::id()));
        }
    }
    cat.stdin.take().unwrap().write_all(b"still reading").unwrap();
    let mut echoed = String::new();
    cat.stdout.take().unwrap().read_to_string(&mut echoed).unwrap();
    assert_eq!(echoed, "still reading");
    assert!(cat.wait().unwrap().success());
    assert!(sleeper.wait().unwrap().success());
}

#[test]
fn a_busy_process_is_not_disturbed() {
    let script = "i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done; echo $i";
    let mut busy = Command::new("sh")
        .args(["-c", script])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    settle(&busy);
    let mut calls = 0;
    while call_in_process(busy.id(), libc::SYS_getpid, &[], &mut |_| {})
        .is_ok_and(|pid| pid == i64::from(busy.id()))
    {
        calls += 1;
    }
    assert!(calls > 0);
    let mut said = String::new();
    busy.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(said, "60000\n");
    // As we are its parent as well as its tracer, the tracer may have waited for it already.
    let _ = busy.wait();
}

#[test]
fn arguments_arrive_and_failures_are_the_kernels() {
    let cat = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
    settle(&cat);
    let closed = call_in_process(cat.id(), libc::SYS_close, &[12345], &mut |_| {}).unwrap();
    assert_eq!(closed, i64::from(-libc::EBADF));
    // dup3(0, 55, O_CLOEXEC) takes three.
    let flags = u64::from(libc::O_CLOEXEC.cast_unsigned());
    assert_eq!(
        call_in_process(cat.id(), libc::SYS_dup3, &[0, 55, flags], &mut |_| {}).unwrap(),
        55
    );
    PidFd::open(cat.id()).unwrap().take_fd(55).unwrap();
    drop(cat.wait_with_output());
}

#[test]
fn a_tracer_killed_at_any_stage_leaves_the_process_running_as_before() {
    for stage in CALL_STAGES {
        let mut traced = Traced::start();
        let tracer = Command::new(std::env::current_exe().unwrap())
            .args(["helper_tracer", "--exact"])
            .env("TRACER_PID", traced.pid().to_string())
            .env("TRACER_STAGE", format!("{stage:?}"))
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(!tracer.success(), "the tracer was to die at {stage:?}");
        for page in 0..20 {
            traced.say(&format!("w {page}"));
        }
        let own = call_in_process(traced.pid(), libc::SYS_getpid, &[], &mut |_| {}).unwrap();
        assert_eq!(own, i64::from(traced.pid()), "after a death at {stage:?}");
        writeln!(traced.input, "q").unwrap();
        assert_eq!(
            traced.child.wait().unwrap().code(),
            Some(5),
            "after a death at {stage:?}"
        );
    }
}

#[test]
fn a_process_that_is_stopped_or_gone_is_refused_by_name() {
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    settle(&child);
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    let stopped = call_in_process(child.id(), libc::SYS_getpid, &[], &mut |_| {});
    assert!(matches!(stopped, Err(SysError::TargetStopped(_))), "{stopped:?}");
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    assert!(call_in_process(child.id(), libc::SYS_getpid, &[], &mut |_| {}).is_ok());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(call_in_process(child.id(), libc::SYS_getpid, &[], &mut |_| {}).is_err());
}
