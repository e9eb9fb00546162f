//! What the source over the attach protocol promises, against a fake VMM: its guest counts its steps in its memory and in its state.

#[path = "common/fake_vmm.rs"]
#[allow(dead_code, reason = "each test file uses some of it")]
mod fake_vmm;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use fake_vmm::{PAGES, Vmm, running, running_at};
use romulus_hypervisor::kvm::source::{AttachError, AttachOptions, KvmSource, Refusal};
use romulus_hypervisor::source::{BarrierError, Checkpoint, GuestEvent, GuestSource};
use romulus_types::{PAGE_BYTES, PageIndex};
use romulus_vmm_attach::fake::Call;
use romulus_vmm_attach::proto::Event;

/// Long enough for anything on a busy machine.
const LONG: Duration = Duration::from_secs(20);

fn options(vmm: &Vmm) -> AttachOptions {
    let mut options = AttachOptions::new(&vmm.socket);
    options.pause_limit_ns = 20_000_000_000;
    options
}

fn attach(vmm: &Vmm) -> Box<KvmSource> {
    Box::new(KvmSource::attach(options(vmm)).unwrap())
}

fn pass() -> Result<(), BarrierError> {
    Ok(())
}

/// What a backup would have.
struct Image(Vec<u8>);

impl Image {
    /// Starts tracking and copies everything, as a session begins.
    fn of(source: &mut dyn GuestSource) -> Self {
        source.arm().unwrap();
        let pages = source.layout().page_count();
        assert_eq!(pages, PAGES.iter().sum::<u64>());
        let mut memory = vec![0; usize::try_from(pages).unwrap() * PAGE_BYTES];
        source.read_pages(PageIndex(0), &mut memory).unwrap();
        let mut part = vec![0; 2 * PAGE_BYTES];
        source.read_pages(PageIndex(PAGES[0] - 1), &mut part).unwrap();
        assert!(source.read_pages(PageIndex(pages - 1), &mut part).is_err());
        Self(memory)
    }

    fn apply(&mut self, checkpoint: &Checkpoint) {
        assert!(checkpoint.pages.is_sorted());
        for (page, content) in checkpoint.page_contents() {
            let at = usize::try_from(page.0).unwrap() * PAGE_BYTES;
            self.0[at..at + PAGE_BYTES].copy_from_slice(content);
        }
    }

    /// The guest writes its step into its first page and into its state.
    fn assert_of_one_moment(&self, checkpoint: &Checkpoint) {
        assert_eq!(
            self.0[..8],
            checkpoint.device_state[8..16],
            "memory and state are of one step"
        );
    }
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + LONG;
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not come about");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn goes_on(vmm: &Vmm) {
    let steps = vmm.machine.steps();
    wait_until("a step of the guest", || vmm.machine.steps() > steps);
}

#[test]
fn checkpoints_are_of_one_moment_and_no_failed_one_forgets_a_page() {
    let vmm = running();
    let mut source = attach(&vmm);
    source.bootstrap().unwrap();
    let mut image = Image::of(&mut *source);
    let mut checkpoint = Checkpoint::default();
    source.precopy(&mut checkpoint).unwrap();
    assert!(checkpoint.device_state.is_empty());
    image.apply(&checkpoint);
    for round in 0..40 {
        goes_on(&vmm);
        vmm.machine.device_write(round % 103);
        let mut refuse = || Err(BarrierError::new(Box::new(std::fmt::Error)));
        match round % 4 {
            0 => {}
            1 => vmm.machine.fail_next(Call::Save),
            2 => vmm.machine.fail_next(Call::Pause),
            _ => assert!(source.capture(&mut refuse, false, &mut checkpoint).is_err()),
        }
        if matches!(round % 4, 1 | 2) {
            assert!(source.capture(&mut pass, false, &mut checkpoint).is_err());
            assert!(checkpoint.pages.is_empty());
        }
        goes_on(&vmm);
        let last = round == 39;
        let report = source.capture(&mut pass, last, &mut checkpoint).unwrap();
        assert_eq!(report.dirty_pages, checkpoint.pages.len() as u64);
        assert!(report.dirty_pages > 0);
        image.apply(&checkpoint);
        image.assert_of_one_moment(&checkpoint);
    }
    assert!(!vmm.machine.is_running(), "the last one was to stay stopped");
    assert!(image.0 == vmm.machine.contents(), "a page was lost");
    source.resume().unwrap();
    goes_on(&vmm);
    source.detach().unwrap();
    wait_until("the end of the tracking", || !vmm.machine.is_armed());
    goes_on(&vmm);
}

#[test]
fn a_pause_that_lasts_too_long_is_void_and_taken_again() {
    let vmm = running();
    let mut options = options(&vmm);
    options.pause_limit_ns = 100_000_000;
    let mut source = KvmSource::attach(options).unwrap();
    let mut image = Image::of(&mut source);
    let mut barriers = 0;
    let steps = || vmm.machine.steps();
    let mut late = || {
        barriers += 1;
        let before = steps();
        wait_until("the VMM's deadline", || steps() > before);
        Ok(())
    };
    let mut checkpoint = Checkpoint::default();
    source.capture(&mut late, true, &mut checkpoint).unwrap();
    assert_eq!(barriers, 1, "the barrier stays where it was");
    image.apply(&checkpoint);
    image.assert_of_one_moment(&checkpoint);
    assert!(image.0 == vmm.machine.contents());
}

#[test]
fn more_pages_than_a_checkpoint_may_have_are_refused_and_precopied_bit_by_bit() {
    let vmm = running_at(Duration::from_millis(500));
    let mut options = options(&vmm);
    options.checkpoint_pages_max = 15;
    let mut source = KvmSource::attach(options).unwrap();
    let mut image = Image::of(&mut source);
    (60..80).for_each(|page| vmm.machine.device_write(page));
    let mut checkpoint = Checkpoint::default();
    let error = source.capture(&mut pass, false, &mut checkpoint).unwrap_err();
    assert!(error.to_string().contains("checkpoint_bytes_max"), "{error}");
    assert!(vmm.machine.is_running());
    let mut seen = BTreeSet::new();
    let deadline = Instant::now() + LONG;
    while !(60..80).all(|page| seen.contains(&page)) {
        assert!(Instant::now() < deadline, "{seen:?}");
        source.precopy(&mut checkpoint).unwrap();
        assert!(checkpoint.pages.len() <= 15);
        seen.extend(checkpoint.pages.iter().map(|page| page.0));
        image.apply(&checkpoint);
    }
    source.capture(&mut pass, true, &mut checkpoint).unwrap();
    image.apply(&checkpoint);
    assert!(image.0 == vmm.machine.contents());
}

#[test]
fn a_suspended_guest_runs_on_when_its_replicator_is_gone_and_a_stopped_one_does_not() {
    let vmm = running();
    let mut source = attach(&vmm);
    source.suspend().unwrap();
    assert!(!vmm.machine.is_running());
    let mut checkpoint = Checkpoint::default();
    assert!(
        source.capture(&mut pass, false, &mut checkpoint).is_err(),
        "not armed"
    );
    assert!(!vmm.machine.is_running());
    drop(source);
    wait_until("the guest to run on", || vmm.machine.is_running());
    let mut source = attach(&vmm);
    let mut image = Image::of(&mut *source);
    source.suspend().unwrap();
    // A checkpoint of a guest that was suspended before leaves it so.
    source.capture(&mut pass, false, &mut checkpoint).unwrap();
    image.apply(&checkpoint);
    assert!(!vmm.machine.is_running());
    assert!(image.0 == vmm.machine.contents());
    source.stop_guest().unwrap();
    assert!(source.resume().is_err());
    drop(source);
    std::thread::sleep(Duration::from_millis(50));
    assert!(!vmm.machine.is_running(), "it was stopped for good");
    let refused = KvmSource::attach(options(&vmm)).map(drop);
    assert!(
        matches!(&refused, Err(AttachError::Refused(list)) if *list == [Refusal::Stopped]),
        "{refused:?}"
    );
}

#[test]
fn what_the_vmm_says_of_its_guest_is_passed_on() {
    let vmm = running();
    let mut source = attach(&vmm);
    for event in [Event::Paused, Event::Resumed, Event::Reset, Event::Crashed] {
        vmm.events.post(event);
    }
    let mut seen = Vec::new();
    let deadline = Instant::now() + LONG;
    while seen.len() < 4 && Instant::now() < deadline {
        seen.extend(source.poll_events());
    }
    assert_eq!(
        seen,
        [
            GuestEvent::Paused,
            GuestEvent::Resumed,
            GuestEvent::Reset,
            GuestEvent::Crashed
        ]
    );
}

#[test]
fn a_machine_that_changed_is_read_again_before_it_is_protected_again() {
    let vmm = running();
    let mut source = attach(&vmm);
    let _ = Image::of(&mut *source);
    vmm.events.post(Event::MachineChanged);
    let deadline = Instant::now() + LONG;
    let mut events = Vec::new();
    while events.is_empty() && Instant::now() < deadline {
        events = source.poll_events();
    }
    assert_eq!(events, [GuestEvent::DevicesChanged]);
    let mut checkpoint = Checkpoint::default();
    assert!(source.capture(&mut pass, false, &mut checkpoint).is_err());
    goes_on(&vmm);
    source.bootstrap().unwrap();
    let mut image = Image::of(&mut *source);
    source.capture(&mut pass, true, &mut checkpoint).unwrap();
    image.apply(&checkpoint);
    assert!(image.0 == vmm.machine.contents());
}

#[test]
fn a_vmm_that_hangs_up_is_no_guest_that_is_lost() {
    let vmm = running();
    let mut source = attach(&vmm);
    let Vmm { machine, server, .. } = vmm;
    drop(server);
    let deadline = Instant::now() + LONG;
    let mut events = Vec::new();
    while events.is_empty() && Instant::now() < deadline {
        events = source.poll_events();
    }
    assert_eq!(events, [GuestEvent::DevicesChanged], "its process is alive");
    assert!(source.bootstrap().is_err(), "nobody listens");
    assert!(machine.is_running());
}

#[test]
fn a_tap_that_is_none_of_the_guests_is_refused_and_a_missing_vmm_is_named() {
    let vmm = running();
    let mut other = options(&vmm);
    other.taps = vec!["tap7".into()];
    let error = KvmSource::attach(other).map(drop).unwrap_err().to_string();
    assert!(error.contains("tap7"), "{error}");
    let missing = AttachOptions::new("/nowhere/attach");
    let error = KvmSource::attach(missing).map(drop).unwrap_err().to_string();
    assert!(error.contains("/nowhere/attach"), "{error}");
}
