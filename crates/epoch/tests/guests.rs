//! Steering against guests of which everything is known: it gets to its goal, stays there, and follows a step of the load.

use romulus_epoch::{Goal, Limits, Reach, Sample, Steering, WINDOW_EPOCHS};

const MS: f64 = 1e6;
const US: f64 = 1e3;
const LIMITS: Limits = Limits {
    least_ns: 5.0 * MS,
    most_ns: 200.0 * MS,
    fault_ns: 2.0 * US,
};

/// A guest that writes so many pages a millisecond, of a working set of so many.
#[derive(Clone, Copy)]
struct Guest {
    pages_a_ms: f64,
    set_pages: f64,
}

impl Guest {
    /// Pages that differ, of random writes in so long.
    fn dirty(self, length_ns: f64) -> f64 {
        self.set_pages * (1.0 - (-self.pages_a_ms * length_ns / MS / self.set_pages).exp())
    }

    fn epoch(self, length_ns: f64, noise: f64) -> Sample {
        let dirty_pages = self.dirty(length_ns);
        Sample {
            length_ns,
            pause_ns: (300.0 * US + dirty_pages * 1.0 * US) * noise,
            dirty_pages,
            commit_ns: (800.0 * US + dirty_pages * 2.0 * US) * noise,
        }
    }

    fn held_ns(self, length_ns: f64) -> f64 {
        let epoch = self.epoch(length_ns, 1.0);
        length_ns / 2.0 + epoch.pause_ns + epoch.commit_ns
    }

    fn overhead(self, length_ns: f64) -> f64 {
        let epoch = self.epoch(length_ns, 1.0);
        (epoch.pause_ns + epoch.dirty_pages * LIMITS.fault_ns) / length_ns
    }
}

/// 0.8 to 1.2, the same in every run.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        0.8 + 0.4 * f64::from(u32::try_from(self.0 >> 40).expect("24 bits")) / f64::from(1 << 24)
    }
}

/// Lengths after each of so many windows.
fn run(steering: &mut Steering, guest: Guest, windows: usize, noise: &mut Noise) -> Vec<f64> {
    let mut lengths = Vec::new();
    for _ in 0..windows {
        for _ in 0..WINDOW_EPOCHS {
            steering.add(guest.epoch(steering.length_ns(), noise.next()));
        }
        lengths.push(steering.length_ns());
    }
    lengths
}

const GUESTS: [Guest; 4] = [
    // Nearly idle, a hot working set, and two that always write new pages.
    Guest {
        pages_a_ms: 0.5,
        set_pages: 40.0,
    },
    Guest {
        pages_a_ms: 200.0,
        set_pages: 1000.0,
    },
    Guest {
        pages_a_ms: 10.0,
        set_pages: 1e6,
    },
    Guest {
        pages_a_ms: 40.0,
        set_pages: 1e6,
    },
];

#[test]
fn a_latency_goal_is_reached_and_kept_under_noise() {
    for (number, guest) in GUESTS.into_iter().enumerate() {
        let goal = Goal::Latency { held_ns: 15.0 * MS };
        let mut steering = Steering::new(goal, LIMITS, 25.0 * MS);
        let lengths = run(&mut steering, guest, 40, &mut Noise(number as u64));
        assert_eq!(steering.reach(), Reach::Reached, "guest {number}");
        for length in &lengths[10..] {
            let held = guest.held_ns(*length);
            assert!(
                (13.0 * MS..17.0 * MS).contains(&held),
                "guest {number}: {held} ns at {length} ns of {lengths:?}"
            );
        }
    }
}

#[test]
fn an_overhead_goal_is_reached_and_kept_where_a_longer_epoch_helps() {
    for (number, guest) in GUESTS[..3].iter().enumerate() {
        let goal = Goal::Overhead { ratio: 0.05 };
        let mut steering = Steering::new(goal, LIMITS, 25.0 * MS);
        let lengths = run(&mut steering, *guest, 60, &mut Noise(number as u64));
        for length in &lengths[20..] {
            let overhead = guest.overhead(*length);
            let shortest = *length <= LIMITS.least_ns * 1.3;
            assert!(
                (0.04..0.062).contains(&overhead) || (shortest && overhead < 0.05),
                "guest {number}: {overhead} at {length} ns of {lengths:?}"
            );
        }
    }
}

#[test]
fn a_goal_that_no_length_reaches_is_said_to_be_out_of_reach() {
    let wild = Guest {
        pages_a_ms: 80.0,
        set_pages: 1e6,
    };
    let mut steering = Steering::new(Goal::Overhead { ratio: 0.05 }, LIMITS, 25.0 * MS);
    run(&mut steering, wild, 60, &mut Noise(1));
    assert_eq!(steering.reach(), Reach::OutOfReach);
    let mut steering = Steering::new(Goal::Latency { held_ns: 2.0 * MS }, LIMITS, 25.0 * MS);
    run(&mut steering, GUESTS[1], 20, &mut Noise(1));
    assert_eq!(steering.reach(), Reach::OutOfReach);
    assert!(steering.length_ns() <= LIMITS.least_ns * 1.06);
}

#[test]
fn a_step_of_the_load_is_followed_without_swinging() {
    let goal = Goal::Latency { held_ns: 15.0 * MS };
    let (calm, busy) = (GUESTS[0], GUESTS[3]);
    let mut noise = Noise(7);
    let mut steering = Steering::new(goal, LIMITS, 25.0 * MS);
    run(&mut steering, calm, 20, &mut noise);
    for guest in [busy, calm, busy] {
        let lengths = run(&mut steering, guest, 20, &mut noise);
        let settled = &lengths[8..];
        let (least, most) = settled.iter().fold((f64::MAX, 0.0_f64), |(least, most), length| {
            (least.min(*length), most.max(*length))
        });
        assert!(
            most / least < 1.25,
            "it swings between {least} and {most}: {lengths:?}"
        );
        for length in settled {
            let held = guest.held_ns(*length);
            assert!((13.0 * MS..17.0 * MS).contains(&held), "{held} of {lengths:?}");
        }
    }
}

#[test]
fn samples_that_are_no_numbers_are_passed_over() {
    let mut steering = Steering::new(Goal::Latency { held_ns: 15.0 * MS }, LIMITS, 25.0 * MS);
    for length_ns in [f64::NAN, f64::INFINITY, -1.0, 0.0] {
        for _ in 0..WINDOW_EPOCHS {
            let odd = Sample {
                length_ns,
                ..GUESTS[0].epoch(25.0 * MS, 1.0)
            };
            assert!(!steering.add(odd));
        }
    }
    assert_eq!(steering.length_ns(), 25.0 * MS);
}
