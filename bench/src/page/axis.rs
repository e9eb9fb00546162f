//! Numbers to places along an axis, and the ticks there.

/// From a range of numbers to a range of pixels.
#[derive(Clone, Debug)]
pub(super) struct Axis {
    logarithmic: bool,
    /// Ends, as logarithms where it is logarithmic.
    low: f64,
    high: f64,
    /// Where the ends are, in pixels.
    from: f64,
    to: f64,
}

/// What spreads over more than this, as a ratio, is drawn on a logarithmic axis where it can be.
const WIDE: f64 = 8.0;
/// Space beside the outermost numbers, as part of the axis.
const MARGIN: f64 = 0.04;
/// No number is drawn further from 0: the distance between two of them stays finite.
const FAR: f64 = 1e300;
/// About so many ticks.
const TICKS: f64 = 6.0;

impl Axis {
    /// With all finite numbers on it; with 0, too, when they are close together.
    pub(super) fn over(numbers: impl IntoIterator<Item = f64>, from: f64, to: f64) -> Self {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for number in numbers.into_iter().filter(|number| number.is_finite()) {
            low = low.min(number.clamp(-FAR, FAR));
            high = high.max(number.clamp(-FAR, FAR));
        }
        if low > high {
            (low, high) = (0.0, 1.0);
        }
        let logarithmic = low > 0.0 && high / low > WIDE;
        if logarithmic {
            (low, high) = (low.log10(), high.log10());
        } else {
            (low, high) = (low.min(0.0), high.max(0.0));
        }
        if high - low <= f64::MIN_POSITIVE {
            high = low + 1.0;
        }
        let margin = (high - low) * MARGIN;
        if logarithmic || low < 0.0 {
            low -= margin;
        }
        Self {
            logarithmic,
            low,
            high: high + margin,
            from,
            to,
        }
    }

    /// In pixels; what lies outside is moved to the end.
    pub(super) fn place(&self, number: f64) -> f64 {
        let number = if self.logarithmic {
            number.max(f64::MIN_POSITIVE).log10()
        } else {
            number.clamp(-FAR, FAR)
        };
        let part = (number - self.low) / (self.high - self.low);
        self.from + part.clamp(0.0, 1.0) * (self.to - self.from)
    }

    /// Numbers with their places.
    pub(super) fn ticks(&self) -> Vec<(f64, f64)> {
        let all = if self.logarithmic {
            self.powers()
        } else {
            self.steps()
        };
        all.into_iter()
            .map(|number| (number, self.place(number)))
            .collect()
    }

    fn steps(&self) -> Vec<f64> {
        let rough = (self.high - self.low) / TICKS;
        let size = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0]
            .map(|times| times * size)
            .into_iter()
            .find(|step| *step >= rough)
            .unwrap_or(size * 10.0);
        let first = (self.low / step).ceil();
        // At most as many as there is room for, whatever rounding does.
        (0..16)
            .map(|number| (first + f64::from(number)) * step)
            .take_while(|number| *number <= self.high)
            .collect()
    }

    fn powers(&self) -> Vec<f64> {
        let decades = self.high - self.low;
        let within: &[f64] = match decades {
            few if few <= 1.6 => &[1.0, 2.0, 5.0],
            few if few <= 3.2 => &[1.0, 3.0],
            _ => &[1.0],
        };
        let skip = (decades / (TICKS * 1.5)).ceil().max(1.0);
        let mut ticks = Vec::new();
        let mut power = self.low.floor();
        while power <= self.high {
            for times in within {
                let place = power + times.log10();
                if (self.low..=self.high).contains(&place) {
                    ticks.push(times * 10_f64.powf(power));
                }
            }
            power += skip;
        }
        ticks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_are_close_are_on_a_straight_axis_from_zero_and_others_on_a_logarithmic_one() {
        let straight = Axis::over([2.0, 4.0], 0.0, 104.0);
        assert!(
            (straight.place(2.0) - 50.0).abs() < 0.1,
            "{}",
            straight.place(2.0)
        );
        let wide = Axis::over([1.0, 10_000.0], 0.0, 100.0);
        assert!((wide.place(100.0) - 50.0).abs() < 0.1, "{}", wide.place(100.0));
        assert_eq!(wide.ticks().len(), 5);
        let below = Axis::over([-1.0, 1.0], 0.0, 100.0);
        assert!((below.place(0.0) - 50.0).abs() < 0.1);
    }

    #[test]
    fn every_axis_has_finite_places_and_few_ticks_whatever_the_numbers_are() {
        let hostile = [
            f64::MIN,
            f64::MAX,
            f64::MIN_POSITIVE,
            -0.0,
            0.0,
            5e-324,
            1.0,
            f64::NAN,
            f64::INFINITY,
        ];
        for a in hostile {
            for b in hostile {
                let axis = Axis::over([a, b], 10.0, 90.0);
                let ticks = axis.ticks();
                assert!(ticks.len() <= 24, "{a} {b}: {}", ticks.len());
                let places = ticks.iter().map(|(_, place)| *place);
                for place in places.chain([a, b].iter().filter(|n| n.is_finite()).map(|n| axis.place(*n))) {
                    assert!((10.0..=90.0).contains(&place), "{a} {b}: {place}");
                }
            }
        }
    }
}
