//! A crash at every step of every operation: what is found afterwards is exactly the last commit or the one
//! that was being made, never a mix, and an image that was being copied is unusable.

mod support;

use std::collections::BTreeMap;

use proptest::prelude::*;
use romulus_image::{
    Crashing, Files, Fuse, HostFiles, Image, ImageError, ImageState, MemFiles, UnusableReason,
};
use romulus_types::{Epoch, PageIndex, Session};
use support::{FILES, Model, PAGES, TestKeeper, assert_same, in_folder, layout, limits, page, stage, vm};

#[derive(Clone, Debug)]
enum Step {
    /// A new session that copies all memory, from zero or keeping what is equal.
    Sync {
        memory: [u8; PAGES],
        surveyed: bool,
        pages: BTreeMap<u64, u8>,
    },
    /// A checkpoint; `discarded`: its connection breaks before the commit.
    Checkpoint {
        pages: BTreeMap<u64, u8>,
        state_bytes: usize,
        discarded: bool,
        at_once: usize,
    },
}

fn pages() -> impl Strategy<Value = BTreeMap<u64, u8>> {
    prop::collection::btree_map(0..PAGES as u64, 0..4u8, 0..6)
}

fn step() -> impl Strategy<Value = Step> {
    let sync =
        (prop::array::uniform8(0..4u8), any::<bool>(), pages()).prop_map(|(memory, surveyed, pages)| {
            Step::Sync {
                memory,
                surveyed,
                pages,
            }
        });
    let state_bytes = prop_oneof![Just(0), Just(1), Just(700), Just(70_000)];
    let checkpoint = (pages(), state_bytes, prop::bool::weighted(0.2), 1..4usize).prop_map(
        |(pages, state_bytes, discarded, at_once)| Step::Checkpoint {
            pages,
            state_bytes,
            discarded,
            at_once,
        },
    );
    prop_oneof![1 => sync, 4 => checkpoint]
}

fn script() -> impl Strategy<Value = Vec<Step>> {
    let first = (prop::array::uniform8(0..4u8), pages()).prop_map(|(memory, pages)| Step::Sync {
        memory,
        surveyed: false,
        pages,
    });
    (first, prop::collection::vec(step(), 1..6)).prop_map(|(first, mut rest)| {
        rest.insert(0, first);
        rest
    })
}

/// What may be found after a crash now. `None` stands for an unusable image.
#[derive(Default)]
struct Allowed {
    committed: Option<Model>,
    /// While a call is under way that moves on from `committed`.
    next: Option<Option<Model>>,
}

impl Allowed {
    /// Runs the call that moves from `committed` to `next`.
    fn moving<T>(
        &mut self,
        next: Option<Model>,
        call: impl FnOnce() -> Result<T, ImageError>,
    ) -> Result<T, ImageError> {
        self.next = Some(next);
        let done = call()?;
        self.committed = self.next.take().expect("it was put there above");
        Ok(done)
    }

    fn assert_allows<F: Files>(&self, image: &Image<F>) {
        let candidates = std::iter::once(&self.committed).chain(&self.next);
        let fits = |model: &&Option<Model>| match (image.state(), model) {
            (
                ImageState::Unusable {
                    reason: UnusableReason::Marked,
                },
                None,
            ) => true,
            (
                ImageState::Committed {
                    session,
                    epoch,
                    applied: true,
                    ..
                },
                Some(model),
            ) => (session, epoch) == (Session(model.session), Epoch(model.epoch)),
            _ => false,
        };
        let model = candidates.into_iter().find(fits);
        let model = model.unwrap_or_else(|| panic!("{image:?} is neither the last commit nor the next"));
        if let Some(model) = model {
            assert_same(image, model);
        }
        image.verify_image().unwrap();
    }
}

fn checkpoint<F: Files>(
    image: &mut Image<F>,
    allowed: &mut Allowed,
    base: &Model,
    pages: &BTreeMap<u64, u8>,
    state_bytes: usize,
    first: bool,
) -> Result<Model, ImageError> {
    let (next, expected) = base.checkpoint(pages, state_bytes, first);
    stage(image, &expected, pages, &next.device_state)?;
    allowed.moving(Some(next.clone()), || image.verify_and_commit(&expected))?;
    assert_same(image, &next);
    Ok(next)
}

fn run_step<F: Files>(
    image: &mut Image<F>,
    allowed: &mut Allowed,
    step: &Step,
    session: u128,
) -> Result<(), ImageError> {
    match step {
        Step::Sync {
            memory,
            surveyed,
            pages,
        } => {
            allowed.moving(None, || image.begin_sync(Session(session)))?;
            if *surveyed {
                image.survey(|_, _| ())?;
            }
            for (index, content) in memory.iter().enumerate() {
                image.sync_page(PageIndex(index as u64), &page(*content))?;
            }
            let base = Model {
                memory: *memory,
                session,
                epoch: 3,
                device_state: Vec::new(),
            };
            checkpoint(image, allowed, &base, pages, 300, true)?;
            image.apply()
        }
        Step::Checkpoint {
            pages,
            state_bytes,
            discarded,
            at_once,
        } => {
            let base = allowed.committed.clone().expect("scripts begin with a copy");
            if *discarded {
                let (next, expected) = base.checkpoint(pages, *state_bytes, false);
                stage(image, &expected, pages, &next.device_state)?;
                image.discard_staging();
                return Ok(());
            }
            checkpoint(image, allowed, &base, pages, *state_bytes, false)?;
            while !image.apply_some(*at_once)? {}
            Ok(())
        }
    }
}

/// Runs the script until it ends or the files die.
fn run<F: Files>(files: F, allowed: &mut Allowed, script: &[Step]) -> Result<(), ImageError> {
    let mut image = Image::create(files, &vm(), layout(), limits())?;
    for (number, step) in script.iter().enumerate() {
        run_step(&mut image, allowed, step, number as u128 + 1)?;
    }
    allowed.assert_allows(&image);
    Ok(())
}

/// After the crash: opens, with one more crash in the middle of that, judges, and goes on working.
fn judge<F: Files>(files: impl Fn() -> F, allowed: &Allowed, second_crash: u64, cut: u16) {
    let died = Image::open(Crashing::new(files(), Fuse::at(second_crash, cut)), limits());
    if let Ok(image) = &died {
        allowed.assert_allows(image);
    }
    drop(died);
    let mut image = match Image::open(files(), limits()) {
        Ok(image) => image,
        Err(ImageError::LayoutDamaged) => {
            assert!(allowed.committed.is_none(), "a commit is lost with its layout");
            Image::create(files(), &vm(), layout(), limits()).unwrap()
        }
        Err(error) => panic!("{error}"),
    };
    allowed.assert_allows(&image);
    let follow = BTreeMap::from([(0, 3), (6, 0), (7, 2)]);
    let mut after = Allowed::default();
    if let ImageState::Committed { session, epoch, .. } = image.state() {
        let models = [allowed.committed.clone(), allowed.next.clone().flatten()];
        let here = models
            .into_iter()
            .flatten()
            .find(|model| (model.session, model.epoch) == (session.0, epoch.0));
        after.committed = here;
        let step = Step::Checkpoint {
            pages: follow,
            state_bytes: 9,
            discarded: false,
            at_once: 2,
        };
        run_step(&mut image, &mut after, &step, 0).unwrap();
    } else {
        let step = Step::Sync {
            memory: [1, 0, 2, 0, 3, 0, 1, 0],
            surveyed: true,
            pages: follow,
        };
        run_step(&mut image, &mut after, &step, 77).unwrap();
    }
    after.assert_allows(&image);
}

/// On tmpfs where there is one, as in production: a disk would take a while to sync at every step.
fn tmpfs_dir() -> tempfile::TempDir {
    let mut builder = tempfile::Builder::new();
    let builder = builder.prefix("romulus-image-");
    builder
        .tempdir_in("/dev/shm")
        .or_else(|_| builder.tempdir())
        .unwrap()
}

/// Steps of the whole script when nothing crashes.
fn steps_of(script: &[Step]) -> u64 {
    let fuse = Fuse::never();
    run(
        Crashing::new(MemFiles::new(), fuse.clone()),
        &mut Allowed::default(),
        script,
    )
    .unwrap();
    fuse.steps()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn after_a_crash_at_any_step_the_last_commit_or_the_next_is_there(
        script in script(),
        torn_permille in 1..1000u16,
        second_crash in 0..12u64,
    ) {
        for step in 0..steps_of(&script) {
            for cut in [0, torn_permille, 1000] {
                let mut allowed = Allowed::default();
                let mem = MemFiles::new();
                let files = Crashing::new(mem.clone(), Fuse::at(step, cut));
                run(files, &mut allowed, &script).expect_err("the fuse blows before the script ends");
                judge(|| mem.clone(), &allowed, second_crash, torn_permille);
            }
        }
    }

    #[test]
    fn after_a_loss_of_power_the_last_commit_or_the_next_is_there(
        script in script(),
        torn_permille in 1..1000u16,
        kept in prop::collection::vec(any::<bool>(), 64),
    ) {
        for step in 0..steps_of(&script) {
            let mut allowed = Allowed::default();
            let mem = MemFiles::with_power_loss();
            let files = Crashing::new(mem.clone(), Fuse::at(step, torn_permille));
            run(files, &mut allowed, &script).expect_err("the fuse blows before the script ends");
            let mut position = usize::try_from(step).unwrap();
            mem.lose_power(|| {
                position += 1;
                kept[position % kept.len()]
            });
            judge(|| mem.clone(), &allowed, u64::MAX, 0);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn real_files_keep_the_same_promise(script in script(), cut in 0..=1000u16) {
        for step in 0..steps_of(&script) {
            let dir = tmpfs_dir();
            let mut allowed = Allowed::default();
            let files = Crashing::new(in_folder(dir.path()), Fuse::at(step, cut));
            run(files, &mut allowed, &script).expect_err("the fuse blows before the script ends");
            judge(|| in_folder(dir.path()), &allowed, step % 7, cut);
        }
    }

    #[test]
    fn files_at_a_keeper_keep_the_same_promise_by_what_it_is_known_to_hold(script in script(), cut in 0..=1000u16) {
        for step in 0..steps_of(&script) {
            let keeper = TestKeeper::default();
            let mut allowed = Allowed::default();
            let files = HostFiles::create(keeper.shelf(FILES), &vm(), FILES).unwrap();
            run(Crashing::new(files, Fuse::at(step, cut)), &mut allowed, &script)
                .expect_err("the fuse blows before the script ends");
            let next_life = || HostFiles::open(keeper.shelf_of_what_is_settled(FILES), &vm()).unwrap();
            judge(next_life, &allowed, step % 7, cut);
        }
    }
}
