//! A connection is on one thread or on the other, whole.

use tokio::sync::mpsc;

use super::*;

#[test]
fn a_busy_connection_moves_and_comes_back_when_it_is_quiet() {
    assert_eq!(after(Place::Prompt, BUSY_PERCENT), Place::Prompt);
    assert_eq!(after(Place::Prompt, BUSY_PERCENT + 1), Place::Bulk);
    assert_eq!(after(Place::Bulk, QUIET_PERCENT), Place::Bulk);
    assert_eq!(after(Place::Bulk, QUIET_PERCENT - 1), Place::Prompt);
}

#[test]
fn work_is_judged_once_a_window_and_by_all_of_the_time_since() {
    let began = Instant::now();
    let mut window = Window::new(began);
    let work = Duration::from_millis(10);
    assert_eq!(window.add(work, began + WINDOW / 2), None);
    assert_eq!(window.add(work, began + WINDOW), Some(40));
    let later = began + WINDOW + Duration::from_secs(1);
    assert_eq!(window.add(work, later), Some(1), "a quiet second");
}

const LONG: Duration = Duration::from_secs(20);

/// Says on which thread it is polled, works, and waits for the next word.
async fn worker(mut words: mpsc::Receiver<Duration>, names: mpsc::Sender<Option<String>>) {
    while let Some(work) = words.recv().await {
        let until = Instant::now() + work;
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        let name = std::thread::current().name().map(str::to_owned);
        names.send(name).await.unwrap();
    }
}

async fn ask(words: &mpsc::Sender<Duration>, names: &mut mpsc::Receiver<Option<String>>, ms: u64) -> bool {
    words.send(Duration::from_millis(ms)).await.unwrap();
    names.recv().await.unwrap().as_deref() == Some("bulk")
}

#[tokio::test]
async fn all_tasks_of_a_connection_move_and_lose_nothing() {
    let bulk = Bulk::new(|| ());
    let load = Load::new(&bulk);
    let (words, heard) = mpsc::channel(1);
    let (names, mut told) = mpsc::channel(1);
    load.spawn(Box::pin(worker(heard, names)));
    let (other_words, heard) = mpsc::channel(1);
    let (names, mut other_told) = mpsc::channel(1);
    load.spawn(Box::pin(worker(heard, names)));

    assert!(
        !ask(&words, &mut told, 0).await,
        "it begins where the endpoint is"
    );
    let moved = async { while !ask(&words, &mut told, 20).await {} };
    tokio::time::timeout(LONG, moved)
        .await
        .expect("it stays though it is busy");
    assert!(
        ask(&other_words, &mut other_told, 0).await,
        "the other task of the connection is still on the first thread"
    );
    let back = async {
        while ask(&words, &mut told, 0).await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LONG, back)
        .await
        .expect("it stays away though it is quiet");
    assert!(
        !ask(&other_words, &mut other_told, 0).await,
        "it did not come back"
    );
}

#[tokio::test]
async fn the_second_thread_ends_with_what_needed_it() {
    static ENDED: OnceLock<()> = OnceLock::new();
    struct AtEnd;
    impl Drop for AtEnd {
        fn drop(&mut self) {
            let _ = ENDED.set(());
        }
    }
    thread_local!(static WATCH: AtEnd = const { AtEnd });
    let bulk = Bulk::new(|| WATCH.with(|_| ()));
    assert!(bulk.handle(Place::Bulk).is_some());
    drop(bulk);
    let ended = async {
        while ENDED.get().is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LONG, ended)
        .await
        .expect("the thread goes on");
}
