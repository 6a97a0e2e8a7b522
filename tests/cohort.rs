//! Cohorts: several images on their way at a time give what one after the other gives.

use std::sync::{Condvar, Mutex};
use std::time::Duration;

use stunet::io::{Geometry, Image};
use stunet::nnunet::predict::{Finished, Sink, Source};
use stunet::{Device, Error, Event, Flow, PredictOptions, Predictor, Progress, Result};

use crate::common::nnunet::Model;

const CASES: usize = 6;
/// Cases that are left out, cannot be read, and have other channels than the model.
const LEFT_OUT: usize = 1;
const BROKEN: usize = 3;
const WRONG: usize = 4;

/// What happened, in order.
#[derive(Debug, Clone, PartialEq)]
enum Step {
    Read(usize),
    Put(usize),
}

/// Both ends of a run.
#[derive(Default)]
struct Ends {
    steps: Mutex<Vec<Step>>,
    changed: Condvar,
    /// Whether what becomes of the first case waits until the third is read.
    wait: bool,
    waited: Mutex<bool>,
}

impl Ends {
    fn note(&self, step: Step) {
        self.steps.lock().unwrap().push(step);
        self.changed.notify_all();
    }
}

fn grid(case: usize) -> Geometry {
    Geometry::new([9 + case, 11, 10], [1.5, 1.4, 1.6])
}

fn image(case: usize) -> Image {
    let value = |i: usize| (i * 37 % 211) as f32 - 20.0 * case as f32;
    let channels = if case == WRONG { 2 } else { 1 };
    Image::new(vec![(0..grid(case).len()).map(value).collect(); channels], grid(case)).unwrap()
}

impl Source for Ends {
    fn cases(&self) -> usize {
        CASES
    }

    fn grid(&self, case: usize) -> Result<Option<Geometry>> {
        Ok((case != LEFT_OUT).then(|| grid(case)))
    }

    fn read(&self, case: usize) -> Result<Image> {
        self.note(Step::Read(case));
        if case == BROKEN { Err(Error::Input { what: "no image".into() }) } else { Ok(image(case)) }
    }
}

/// Labels by case, or what was said instead.
struct Results<'a> {
    ends: &'a Ends,
    labels: Vec<std::result::Result<Option<Vec<u16>>, String>>,
    fails_at: Option<usize>,
}

impl Sink for Results<'_> {
    fn put(&mut self, case: usize, outcome: Result<Option<Finished>>) -> Result<()> {
        assert_eq!(case, self.labels.len());
        if self.ends.wait && case == 0 {
            let unread = |steps: &mut Vec<Step>| !steps.contains(&Step::Read(2));
            let steps = self.ends.steps.lock().unwrap();
            let (_steps, late) = self.ends.changed.wait_timeout_while(steps, Duration::from_secs(60), unread).unwrap();
            *self.ends.waited.lock().unwrap() = !late.timed_out();
        }
        if self.fails_at == Some(case) {
            return Err(Error::Usage { what: "the sink is full".into() });
        }
        let labels = outcome.map(|done| {
            done.map(|d| {
                let stages: Vec<&str> = d.prediction.report.seconds.iter().map(|(s, _)| s.as_str()).collect();
                assert_eq!(stages, ["read", "preprocess", "network", "export"]);
                assert_eq!(d.image, image(case));
                d.prediction.segmentation.labels.iter().collect()
            })
        });
        self.labels.push(labels.map_err(|e| e.to_string()));
        self.ends.note(Step::Put(case));
        Ok(())
    }
}

struct Bench {
    _folder: tempfile::TempDir,
    predictor: Predictor,
}

fn bench(threads: usize, limit: Option<usize>) -> Bench {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    Model::ct().write(&model, &["fold_0"]);
    let options = PredictOptions::default().mirroring(false).memory_limit(limit);
    let device = Device::cpu_with_threads(threads).unwrap();
    let predictor = Predictor::open(&model, &device).unwrap().options(options);
    Bench { _folder: folder, predictor }
}

type Labels = Vec<std::result::Result<Option<Vec<u16>>, String>>;

fn run(bench: &mut Bench, ends: &Ends) -> Labels {
    let mut results = Results { ends, labels: Vec::new(), fails_at: None };
    let mut told = Vec::new();
    let mut progress = |case: usize| -> Box<dyn Progress> {
        told.push(case);
        Box::new(())
    };
    bench.predictor.predict_all(ends, &mut results, &mut progress).unwrap();
    assert_eq!(told, (0..CASES).collect::<Vec<_>>());
    results.labels
}

#[test]
fn a_cohort_is_its_images_one_after_the_other() {
    let mut alone = bench(2, None);
    let expected: Vec<_> = (0..CASES).filter(|c| ![LEFT_OUT, BROKEN, WRONG].contains(c)).collect();
    let expected: Vec<Vec<u16>> =
        expected.into_iter().map(|c| alone.predictor.predict(&image(c)).unwrap().labels.iter().collect()).collect();
    for threads in [1, 2, 5] {
        let labels = run(&mut bench(threads, None), &Ends::default());
        let done: Vec<_> = labels.iter().filter_map(|l| l.as_ref().ok()?.clone()).collect();
        assert!(done == expected, "{threads} threads");
        assert_eq!(labels[LEFT_OUT], Ok(None));
        assert!(labels[BROKEN].as_ref().unwrap_err().contains("no image"));
        assert!(labels[WRONG].as_ref().unwrap_err().contains("2 channels"));
    }
}

/// The case after the next is read before the first is stored, with one thread as well.
#[test]
fn stages_run_side_by_side() {
    for threads in [1, 3] {
        let ends = Ends { wait: true, ..Ends::default() };
        run(&mut bench(threads, None), &ends);
        assert!(*ends.waited.lock().unwrap(), "{threads} threads: {:?}", ends.steps.lock().unwrap());
    }
}

/// Where only one case has room, they follow each other; the results are the same.
#[test]
fn what_has_no_room_waits() {
    let expected = run(&mut bench(2, None), &Ends::default());
    let mut tight = bench(2, None);
    let most = (0..CASES).map(|c| tight.predictor.memory_needed(&grid(c), 1).unwrap()).max().unwrap();
    tight = bench(2, Some(most));
    let ends = Ends::default();
    assert!(run(&mut tight, &ends) == expected);
    let cases: Vec<usize> = (0..CASES).filter(|c| *c != LEFT_OUT).collect();
    let steps = ends.steps.into_inner().unwrap();
    let mut open: Option<usize> = None;
    for step in &steps {
        match step {
            Step::Read(c) => assert!(open.replace(*c).is_none(), "{steps:?}"),
            // What failed has left before the sink is told.
            Step::Put(c) => drop(open.take_if(|o| *o == *c)),
        }
        if open == Some(BROKEN) || open == Some(WRONG) {
            open = None;
        }
    }
    assert_eq!(steps.iter().filter(|s| matches!(s, Step::Read(_))).count(), cases.len());
    // Less than the smallest needs: all of them are refused.
    let refused = run(&mut bench(2, Some(1 << 16)), &Ends::default());
    assert!(refused.iter().enumerate().all(|(c, l)| l.is_err() != (c == LEFT_OUT)), "{refused:?}");
}

#[test]
fn a_cohort_can_be_cancelled_and_its_sink_can_end_it() {
    for stage in [true, false] {
        let ends = Ends::default();
        let mut results = Results { ends: &ends, labels: Vec::new(), fails_at: None };
        let mut progress = |case: usize| -> Box<dyn Progress> {
            Box::new(move |e: Event<'_>| {
                let now = if stage { matches!(e, Event::Stage(_)) } else { matches!(e, Event::Tiles { .. }) };
                if case == 2 && now { Flow::Cancel } else { Flow::Continue }
            })
        };
        let end = bench(2, None).predictor.predict_all(&ends, &mut results, &mut progress);
        assert!(matches!(end, Err(Error::Cancelled)), "{end:?}");
        assert!(results.labels.len() == 2 && results.labels[0].is_ok());
    }
    for at in 0..CASES {
        let ends = Ends::default();
        let mut results = Results { ends: &ends, labels: Vec::new(), fails_at: Some(at) };
        let end = bench(1, None).predictor.predict_all(&ends, &mut results, &mut |_| Box::new(()));
        assert!(end.unwrap_err().to_string().contains("full"));
        assert_eq!(results.labels.len(), at);
    }
}
