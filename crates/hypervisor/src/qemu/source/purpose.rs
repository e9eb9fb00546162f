//! What a pause is for, by the fault points that it passes.

/// The fault points of one kind of pause.
#[derive(Debug)]
pub(super) struct Purpose {
    pub(super) before_command: &'static str,
    pub(super) after_command: &'static str,
    pub(super) holding: &'static str,
    pub(super) draining: &'static str,
    pub(super) after_drain: &'static str,
    pub(super) after_resume: &'static str,
}

/// Memory is protected.
pub(super) const ARM: &Purpose = &Purpose {
    before_command: "arm.before_command",
    after_command: "arm.after_command",
    holding: "arm.holding",
    draining: "arm.draining",
    after_drain: "arm.after_drain",
    after_resume: "arm.after_resume",
};
/// Dirty pages are taken in advance.
pub(super) const PRECOPY: &Purpose = &Purpose {
    before_command: "precopy.before_command",
    after_command: "precopy.after_command",
    holding: "precopy.holding",
    draining: "precopy.draining",
    after_drain: "precopy.after_drain",
    after_resume: "precopy.after_resume",
};
/// A checkpoint is taken.
pub(super) const CAPTURE: &Purpose = &Purpose {
    before_command: "capture.before_command",
    after_command: "capture.after_command",
    holding: "capture.holding",
    draining: "capture.draining",
    after_drain: "capture.after_drain",
    after_resume: "capture.after_resume",
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault;

    #[test]
    fn each_purpose_passes_fault_points_of_its_own() {
        for (purpose, prefix) in [(ARM, "arm."), (PRECOPY, "precopy."), (CAPTURE, "capture.")] {
            let points = [
                purpose.before_command,
                purpose.after_command,
                purpose.holding,
                purpose.draining,
                purpose.after_drain,
                purpose.after_resume,
            ];
            for point in points {
                assert!(
                    point.starts_with(prefix) && fault::REPLICATOR_POINTS.contains(&point),
                    "{point}"
                );
            }
        }
    }
}
