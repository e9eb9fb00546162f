//! A machine that hops from process to process, with clients that never lose a connection and never see anything twice.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::datagrams::Datagrams;
use super::hop::Session;
use super::network::Network;
use super::service::Service;
use super::steps::Steps;
use super::vmm::Vmm;

const DISK_BYTES: u64 = 8 << 20;
/// All of memory is compared at one hop in so many, and at the first ones.
const COMPARE_EVERY: usize = 64;
/// Checkpoints of each hop before the last one.
const EPOCHS: usize = 3;
/// Taps that take turns: of the process that ends, of the one that runs, and of the one that waits.
const TAPS: usize = 3;

/// What goes on a tour.
pub struct Plan<'a> {
    /// The VMM.
    pub program: &'a Path,
    /// Its vCPUs.
    pub vcpus: u32,
    /// Its memory, in MiB.
    pub memory_mib: u64,
    /// How often it moves.
    pub hops: usize,
    /// While there is such a file no hop begins, and the machine stands still.
    pub hold: Option<&'a Path>,
}

/// What a tour found out that is no failure.
#[derive(Debug)]
pub struct Found {
    /// Timers of the guest.
    pub timers: u64,
    /// Records on its disk that were read back.
    pub records: u64,
    /// Datagrams that were sent to it, and that came back.
    pub datagrams: (usize, usize),
    /// Pages of each region of its memory that checkpoints have copied.
    pub pages: Vec<usize>,
}

/// Moves a machine with network, disk and self-checks. `steps` tells what is going on.
///
/// # Panics
/// When the guest or a client notices anything but time.
pub fn hop_around(plan: &Plan<'_>, steps: &Steps, mut told: impl FnMut(usize)) -> Found {
    let mut tour = Tour::begin(plan, steps);
    for hop in 1..=plan.hops {
        if let Some(hold) = plan.hold {
            tour.hold(hold);
        }
        steps.hop(hop);
        tour.hop(hop);
        told(hop);
    }
    tour.end(plan.hops)
}

struct Tour<'a> {
    program: &'a Path,
    steps: &'a Steps,
    network: Network,
    service: Service,
    datagrams: Datagrams,
    /// The guest's clock, when it was asked for last.
    clock_ns: u64,
    pages: Vec<usize>,
    vmm: Vmm,
    /// The one before, which is ending.
    _last: Option<Vmm>,
    disk: PathBuf,
    folder: tempfile::TempDir,
}

impl<'a> Tour<'a> {
    fn begin(plan: &Plan<'a>, steps: &'a Steps) -> Self {
        let mut network = Network::new();
        (0..TAPS).for_each(|number| network.add_tap(&tap(number)));
        let folder = folder();
        let disk = folder.path().join("disk");
        std::fs::File::create(&disk).unwrap().set_len(DISK_BYTES).unwrap();
        let (memory, vcpus) = (plan.memory_mib.to_string(), plan.vcpus.to_string());
        let run = [
            "--memory",
            &memory,
            "--vcpus",
            &vcpus,
            "--disk",
            disk.to_str().unwrap(),
            "--cmdline",
            "check=on log=on dirty=random/counter:200:5:8",
        ];
        let mut vmm = Vmm::start(plan.program, folder.path(), "vm0", "run", Some(&tap(0)), &run);
        drop(vmm.attach());
        steps.to("the guest starts to serve");
        let mut service = Service::connect();
        assert_eq!(service.ask("SET first kept"), "+OK");
        Tour {
            program: plan.program,
            steps,
            network,
            service,
            datagrams: Datagrams::new(),
            clock_ns: 0,
            pages: Vec::new(),
            vmm,
            _last: None,
            disk,
            folder,
        }
    }

    fn hop(&mut self, hop: usize) {
        let steps = self.steps;
        steps.to("a process for the standby starts");
        let mut standby = Vmm::start(
            self.program,
            self.folder.path(),
            &format!("vm{hop}"),
            "standby",
            Some(&tap(hop)),
            &["--disk", self.disk.to_str().unwrap()],
        );
        steps.to("all memory is copied while the guest runs");
        let mut session = Session::begin(&mut self.vmm);
        steps.to("the standby builds the machine");
        let waiting = session.prepare(&mut standby);
        for epoch in 0..EPOCHS {
            steps.to("the guest answers in an epoch");
            self.datagrams.send();
            assert_eq!(self.service.ask(&format!("SET hop{hop} epoch{epoch}")), "+OK");
            self.datagrams.take();
            // At another moment of the guest's periods each time.
            std::thread::sleep(Duration::from_micros((hop * 370 + epoch * 1130) as u64 % 5000));
            steps.to("a checkpoint");
            session.checkpoint();
        }
        steps.to("the last checkpoint");
        // On their way when the guest stops, in one direction or the other.
        self.datagrams.send();
        self.service.send(&format!("INCR hops{hop}"));
        session.last_checkpoint();
        if hop < COMPARE_EVERY || hop.is_multiple_of(COMPARE_EVERY) {
            steps.to("all memory is compared");
            assert_eq!(
                session.differences(),
                Vec::<u64>::new(),
                "pages that the bitmap missed, at hop {hop}"
            );
        }
        self.pages.resize(session.copied.len(), 0);
        for (pages, copied) in self.pages.iter_mut().zip(&session.copied) {
            *pages += copied;
        }
        steps.to("the guest is activated in the other process");
        self.vmm.strike();
        self.network.forget(&tap(hop - 1));
        session.activate(waiting);
        steps.to("the process before the last one ends");
        self._last = Some(std::mem::replace(&mut self.vmm, standby));
        self.ask_around(hop);
    }

    /// Stands still while there is a file of that name.
    fn hold(&mut self, file: &Path) {
        if !file.exists() {
            return;
        }
        self.vmm.stop(true);
        while file.exists() {
            self.steps.to("the machine stands still, as it was told to");
            std::thread::sleep(Duration::from_secs(1));
        }
        self.vmm.stop(false);
    }

    /// What the guest has to say after a hop.
    fn ask_around(&mut self, hop: usize) {
        self.steps
            .to("the guest answers what it was asked before the hop");
        let service = &mut self.service;
        assert_eq!(service.reply(), "1", "the request is answered once");
        self.steps.to("the guest is asked after the hop");
        assert_eq!(service.ask("GET first"), "kept");
        let epoch = EPOCHS - 1;
        assert_eq!(service.ask(&format!("GET hop{hop}")), format!("epoch{epoch}"));
        assert_eq!(service.ask("SELFCHECK"), "+OK");
        // So that memory for keys is not what ends a long tour.
        assert_eq!(service.ask(&format!("DEL hop{hop} hops{hop}")), "2");
        let clock = service.ask("CLOCK");
        let now_ns: u64 = clock.split(' ').next().unwrap().parse().unwrap();
        let before_ns = std::mem::replace(&mut self.clock_ns, now_ns);
        assert!(
            now_ns > before_ns,
            "the guest's clock went from {before_ns} to {now_ns}"
        );
        self.datagrams.take();
    }

    fn end(mut self, hops: usize) -> Found {
        self.steps.to("the tour ends");
        assert_eq!(self.vmm.ended(), None);
        self.datagrams.take();
        let datagrams = (self.datagrams.sent(), self.datagrams.back());
        assert!(
            datagrams.1 >= hops * EPOCHS,
            "each datagram before an answer came back: {datagrams:?}"
        );
        assert_eq!(self.service.figure("datagrams_again"), 0);
        Found {
            timers: self.service.figure("timers"),
            records: self.service.figure("records_verified"),
            datagrams,
            pages: self.pages,
        }
    }
}

/// In memory where there is room for it: a busy host's disk may take seconds for a flush, during which a pause waits.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap()
}

fn tap(hop: usize) -> String {
    format!("tap{}", hop % TAPS)
}
