//! The admin socket: served, asked, replaced, guarded, bounded.

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use romulus_telemetry::{AdminClient, CONNECTIONS_MAX, Metrics, TelemetryError, serve_admin, serve_metrics};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;
use tokio::net::UnixStream;

fn router() -> Router {
    Router::new()
        .route(
            "/v1/status",
            get(|| async { Json(json!({"state": "protected"})) }),
        )
        .route("/v1/echo", post(|Json(body): Json<Value>| async { Json(body) }))
        .route(
            "/v1/no",
            post(|| async { (StatusCode::CONFLICT, Json(json!({"error": "not now"}))) }),
        )
        .route("/v1/slow", get(|| async { std::future::pending::<()>().await }))
        .route(
            "/v1/text",
            get(|| async { (StatusCode::IM_A_TEAPOT, "short and stout") }),
        )
        .route("/v1/huge", get(|| async { "x".repeat(17 << 20) }))
}

#[tokio::test]
async fn a_client_gets_what_the_daemon_says() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sub/admin.sock");
    let server = serve_admin(&path, None, router()).unwrap();
    let client = AdminClient::new(&path);
    assert_eq!(
        client.get("/v1/status").await.unwrap(),
        json!({"state": "protected"})
    );
    assert_eq!(
        client.post("/v1/echo", &json!({"a": [1, 2]})).await.unwrap(),
        json!({"a": [1, 2]})
    );
    assert_eq!(
        client.post("/v1/no", &json!({})).await.unwrap()["error"],
        "not now"
    );
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    drop(server);
    assert!(!path.exists());
}

#[tokio::test]
async fn answers_that_are_late_huge_or_not_json_are_named_errors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    let _server = serve_admin(&path, None, router()).unwrap();
    let client = AdminClient::new(&path).with_timeout(Duration::from_millis(200));
    assert!(matches!(
        client.get("/v1/slow").await,
        Err(TelemetryError::Timeout { .. })
    ));
    let client = AdminClient::new(&path);
    assert!(matches!(
        client.get("/v1/huge").await,
        Err(TelemetryError::Body(_))
    ));
    assert!(matches!(
        client.get("/v1/text").await,
        Err(TelemetryError::Answer { status: 418, .. })
    ));
    assert!(matches!(
        client.get("/v1/nowhere").await,
        Err(TelemetryError::Answer { status: 404, .. })
    ));
    assert!(matches!(
        client.get("not a path").await,
        Err(TelemetryError::Path { .. })
    ));
    let nobody = AdminClient::new(dir.path().join("nobody.sock"));
    assert!(matches!(
        nobody.get("/v1/status").await,
        Err(TelemetryError::Unreachable { .. })
    ));
}

#[tokio::test]
async fn a_dead_daemons_socket_is_replaced_and_a_live_ones_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "a closed listener leaves its file");
    let _server = serve_admin(&path, None, router()).unwrap();
    let second = serve_admin(&path, None, router());
    assert!(matches!(second, Err(TelemetryError::SocketInUse { .. })));
    assert!(AdminClient::new(&path).get("/v1/status").await.is_ok());
}

#[tokio::test]
async fn a_file_in_the_sockets_place_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("precious");
    std::fs::write(&path, "data").unwrap();
    assert!(matches!(
        serve_admin(&path, None, router()),
        Err(TelemetryError::NotASocket { .. })
    ));
    assert_eq!(std::fs::read(&path).unwrap(), b"data");
}

#[tokio::test]
async fn connections_beyond_the_limit_wait_until_others_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    let _server = serve_admin(&path, None, router()).unwrap();
    let mut idle = Vec::new();
    for _ in 0..CONNECTIONS_MAX {
        idle.push(UnixStream::connect(&path).await.unwrap());
    }
    let client = AdminClient::new(&path).with_timeout(Duration::from_millis(300));
    assert!(matches!(
        client.get("/v1/status").await,
        Err(TelemetryError::Timeout { .. })
    ));
    idle.truncate(CONNECTIONS_MAX / 2);
    let client = client.with_timeout(Duration::from_secs(10));
    assert!(client.get("/v1/status").await.is_ok());
}

#[tokio::test]
async fn garbage_ends_its_own_connection_only() {
    use tokio::io::AsyncWriteExt as _;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    let _server = serve_admin(&path, None, router()).unwrap();
    let mut stream = UnixStream::connect(&path).await.unwrap();
    stream.write_all(&[0xff; 4096]).await.unwrap();
    let mut answer = Vec::new();
    // Either an error status or a reset, but an end.
    let _ = stream.read_to_end(&mut answer).await;
    assert!(AdminClient::new(&path).get("/v1/status").await.is_ok());
}

#[tokio::test]
async fn metrics_are_on_the_socket_and_on_tcp() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    let metrics = Metrics::new();
    metrics.counter("requests", "Requests answered").inc();
    let _socket = serve_admin(&path, None, router().merge(metrics.router())).unwrap();
    let text = AdminClient::new(&path).text("/metrics").await.unwrap();
    assert!(text.contains("romulus_requests_total 1"), "{text}");
    let tcp = serve_metrics(([127, 0, 0, 1], 0).into(), metrics.router())
        .await
        .unwrap();
    let mut stream = tokio::net::TcpStream::connect(tcp.local_addr().unwrap())
        .await
        .unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut stream, b"GET /metrics HTTP/1.0\r\n\r\n")
        .await
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(
        answer.contains("openmetrics-text") && answer.contains("romulus_requests_total 1"),
        "{answer}"
    );
}
